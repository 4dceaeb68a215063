"""The few exceptions of the project. Each message names the thing, what was wrong and what to do."""

import click


class EdgeError(click.ClickException):
    """Base of every error a person may see; its text is one line.

    A click command shows it as `Error: ...` and exits with `exit_code`.
    """

    exit_code = 1


class BundleError(EdgeError):
    """A bundle is missing, damaged or of another format version."""

    exit_code = 3


class CheckpointError(EdgeError):
    """A checkpoint is missing, damaged, incomplete or of a kind that can't be converted."""

    exit_code = 4


class ConfigError(EdgeError):
    """The configuration file is wrong; the message names the file, the line and the key."""

    exit_code = 5


class TransportError(EdgeError):
    """A broker or a port can't be reached, or refuses; the message names its address."""

    exit_code = 6


class RuntimeFailure(EdgeError):
    """LiteRT refused or failed; the message names the call and the model file."""

    exit_code = 7


class RequestError(EdgeError):
    """A request that can't be answered; `code` is one of the contract's error codes.

    Codes: bad_request, too_long, busy, expired, unavailable, internal.
    """

    exit_code = 8

    def __init__(self, code: str, message: str, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_ms = retry_after_ms
