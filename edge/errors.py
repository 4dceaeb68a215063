"""The exceptions of the project. A message is one line: what it is about, what is wrong and what to do.

The command line gives each of them an exit code (`edge.cli.exit_codes`).
"""


class EdgeError(Exception):
    """Base of every error that a person may see; its text is one line."""


class BundleError(EdgeError):
    """A bundle is missing, damaged or of another format version."""


class CheckpointError(EdgeError):
    """A checkpoint is missing, damaged, incomplete or of a type that can't be converted."""


class ConfigError(EdgeError):
    """The configuration file is wrong; the message names the file, the line and the key."""


class TransportError(EdgeError):
    """A broker or a port can't be reached, or refuses; the message names its address."""


class RuntimeFailure(EdgeError):
    """LiteRT refused or failed; the message names the call and the model file."""


class RequestError(EdgeError):
    """A request that can't be answered; `code` is one of the protocol's error codes.

    Codes: bad_request, too_long, busy, expired, unavailable, internal.
    """

    def __init__(self, code: str, message: str, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_ms = retry_after_ms


class Interruption(Exception):
    """Work on a request was interrupted; `reason` is its finish reason: deadline or cancelled.

    Not an EdgeError: it ends an answer in order, and no user sees it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
