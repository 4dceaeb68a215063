"""The exit codes of `edge-daemon`, `edge-ask` and `edge-convert`: what each means, and what leads to it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import TYPE_CHECKING

from edge.cli.entry import INTERRUPTED
from edge.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    EdgeError,
    RequestError,
    RuntimeFailure,
    TransportError,
)

if TYPE_CHECKING:
    from edge.protocol.messages import Failure, Final


class ExitCode(IntEnum):
    """What a command tells the shell."""

    OK = 0
    FAILED = 1
    USAGE = 2
    BUNDLE = 3
    CHECKPOINT = 4
    CONFIG = 5
    UNREACHABLE = 6
    RUNTIME = 7
    REFUSED = 8
    BUSY = 9
    TIMEOUT = 10
    INTERNAL = 11
    INTERRUPTED = INTERRUPTED


MEANINGS = {
    ExitCode.OK: "success",
    ExitCode.FAILED: "failed",
    ExitCode.USAGE: "wrong command line",
    ExitCode.BUNDLE: "the bundle can't be used",
    ExitCode.CHECKPOINT: "the checkpoint can't be converted",
    ExitCode.CONFIG: "wrong configuration",
    ExitCode.UNREACHABLE: "the broker, node or port can't be reached, or the broker refuses the connection",
    ExitCode.RUNTIME: "LiteRT failed",
    ExitCode.REFUSED: "the request was refused: invalid or too long",
    ExitCode.BUSY: "busy or shutting down; try again later",
    ExitCode.TIMEOUT: "the deadline passed",
    ExitCode.INTERNAL: "the daemon failed; see its log",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C",
}

_OF_ERROR = {
    BundleError: ExitCode.BUNDLE,
    CheckpointError: ExitCode.CHECKPOINT,
    ConfigError: ExitCode.CONFIG,
    TransportError: ExitCode.UNREACHABLE,
    RuntimeFailure: ExitCode.RUNTIME,
    RequestError: ExitCode.REFUSED,
}
_OF_ANSWER = {  # an error's code, or a final's finish_reason
    "bad_request": ExitCode.REFUSED,
    "too_long": ExitCode.REFUSED,
    "busy": ExitCode.BUSY,
    "unavailable": ExitCode.BUSY,
    "expired": ExitCode.TIMEOUT,
    "deadline": ExitCode.TIMEOUT,
    "internal": ExitCode.INTERNAL,
    "cancelled": ExitCode.INTERRUPTED,
}


def of_error(error: EdgeError) -> ExitCode:
    """Give the exit code of an exception; FAILED for one that has no code of its own."""
    return next((code for type_, code in _OF_ERROR.items() if isinstance(error, type_)), ExitCode.FAILED)


def of_answer(answer: Final | Failure) -> ExitCode:
    """Give the exit code of an answer: OK if it is complete, or as long as `max_tokens` allows."""
    from edge.protocol.messages import Failure

    if isinstance(answer, Failure):
        return _OF_ANSWER.get(answer.code, ExitCode.FAILED)
    return _OF_ANSWER.get(answer.finish_reason, ExitCode.OK)


def epilog(*codes: ExitCode, **meanings: str) -> str:
    """List exit codes for the end of a `--help`; `meanings` by name replace or add to the general ones."""
    shown: Mapping[ExitCode, str] = {code: MEANINGS[code] for code in codes} | {
        ExitCode[name]: meaning for name, meaning in meanings.items()
    }
    return "\b\nExit codes:\n" + "\n".join(f"  {code:<4}{shown[code]}" for code in sorted(shown))
