"""The process that grammars are compiled and stepped in, so that one that explodes can be killed.

The worker builds the engine's view of the vocabulary once, and forks a child whenever the daemon asks for
one. A child starts within milliseconds and shares the pages of the view. It serves one answer at a time, and
the kernel limits it: an answer gets `REQUEST_S` of processor time and `STEP_S` more for each operation,
`MEMORY_BYTES`, and a stack of `STACK_BYTES`. A child keeps compiled grammars as long as they take less than
`CACHE_BYTES` together.

The daemon's side is `edge.generation.grammar_client`. The worker ends when the daemon does, because that
closes its control socket; a child ends when the socket that its operations come from is closed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import signal
import socket
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge.errors import RequestError
from edge.generation.answer_format import AnswerFormat
from edge.generation.constraint import Step
from edge.generation.grammar import GrammarCompiler, GrammarConstraint
from edge.generation.grammar_channel import (
    MEMORY_BYTES,
    OUT_OF_MEMORY,
    REQUEST_S,
    STACK_BYTES,
    STATUS,
    STEP_S,
    Channel,
)
from edge.runtime.memory import return_free_memory
from edge.text.tokenizer import Tokenizer

CACHE_BYTES = 16 * 1024 * 1024

_PR_SET_DUMPABLE = 4


def main(control: socket.socket, model: Path, digest: str, cache: Path, stop_ids: Sequence[int]) -> None:
    """Build the view of a vocabulary, then replace the child at each byte from `control`, until it is closed.

    The reply to a byte is a `STATUS` and the socket of the new child. Arguments as for `Tokenizer.open` and
    `GrammarCompiler`.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the daemon decides when the worker ends
    compiler = GrammarCompiler(Tokenizer.open(model, digest, cache), stop_ids)
    gc.collect()
    gc.freeze()
    return_free_memory()
    child = 0
    while control.recv(1):
        status = _end(child)
        ours, theirs = socket.socketpair()
        child = os.fork()
        if not child:
            control.close()
            theirs.close()
            _serve_and_exit(ours, compiler)
        socket.send_fds(control, [STATUS.pack(status, child)], [theirs.fileno()])
        ours.close()
        theirs.close()
    _end(child)


def _end(child: int) -> int:
    """End a child; returns how it ended."""
    if not child:
        return 0
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)  # nothing changes for one that has ended by itself
    return os.waitpid(child, 0)[1]


def _serve_and_exit(channel: socket.socket, compiler: GrammarCompiler) -> None:
    log = _prepare()
    try:
        _Child(Channel(channel), compiler).serve()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except (ConnectionError, EOFError):
        os._exit(0)
    except BaseException as error:  # its message may quote the request, which does not belong in a log
        with open(log, "w") as file:
            traceback.print_tb(error.__traceback__, file=file)
            print(type(error).__name__, file=file)
    finally:
        os._exit(1)


def _prepare() -> int:
    """Let this process be the first to go when memory runs out, and end without a core dump or messages.

    Returns a descriptor of the log.
    """
    log = os.dup(2)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _limit(resource.RLIMIT_STACK, STACK_BYTES)
    return log


def _limit(which: int, size: int) -> None:
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))


class _Child:
    """Carries out the operations that come over a channel.

    "open" begins an answer; all others are methods of its constraint. A reply is what the operation returned,
    whether another reply follows, and the reason of a refusal or None. After a step that followed what is
    forced comes the result of `allowed`, so that it is computed while the decoder runs the step's tokens.
    """

    def __init__(self, channel: Channel, compiler: GrammarCompiler) -> None:
        self._channel, self._compiler = channel, compiler
        self._constraint: GrammarConstraint | None = None
        self._base = _resident()
        self._left_s = REQUEST_S

    def serve(self) -> None:
        """Carry out operations. Raises EOFError at the end of the channel."""
        while True:
            operation, *arguments = self._channel.receive()
            result, refusal = self._limited(operation, arguments)
            followed = operation == "follow" or (operation == "take" and arguments[1])
            self._channel.send((result, followed and not refusal, refusal))
            if followed and not refusal:
                result, refusal = self._limited("allowed", ())
                self._channel.send((result, False, refusal))

    def _limited(self, operation: str, arguments: Sequence[Any]) -> tuple[Any, str | None]:
        """Carry out an operation; the kernel ends this process when the answer's time is used up."""
        if operation == "open":
            self._left_s = REQUEST_S
        signal.setitimer(signal.ITIMER_PROF, self._left_s)
        try:
            method = self._open if operation == "open" else getattr(self._constraint, operation)
            result = method(*arguments)
        except RequestError as error:
            return None, str(error)
        finally:
            left_s, _ = signal.setitimer(signal.ITIMER_PROF, 0)
            self._left_s = min(REQUEST_S, left_s + STEP_S)
        return (tuple(result) if isinstance(result, Step) else result), None

    def _open(self, answer_format: str, max_tokens: int, taken: Sequence[int]) -> None:
        """Begin an answer, or go on after the tokens of it that were `taken`."""
        self._constraint = None
        while _resident() - self._base > CACHE_BYTES and self._compiler.forget_oldest():
            return_free_memory()
        _limit(resource.RLIMIT_DATA, _statm(5) + MEMORY_BYTES)
        grammar = self._compiler.compile(AnswerFormat.from_json(answer_format))
        self._constraint = grammar.constrain(max_tokens)
        self._constraint.accept(taken)


def _resident() -> int:
    """Return the bytes of resident memory that are not a file's."""
    return _statm(1) - _statm(2)


def _statm(field: int) -> int:
    return int(Path("/proc/self/statm").read_text().split()[field]) * resource.getpagesize()
