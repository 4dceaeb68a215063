"""Constraints whose grammars live in a worker process (`edge.generation.grammar_worker`).

Promises: no format takes more than the worker's limits, nor harms anything but its own request. Deadline and
cancellation take effect while the worker computes. If something other than its limits ends the worker, it is
replaced, and the answer continues.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edge.errors import EdgeError, Interruption, RequestError
from edge.generation.answer_format import AnswerFormat
from edge.generation.constraint import Step
from edge.generation.grammar_channel import (
    MEMORY_BYTES,
    OUT_OF_MEMORY,
    REQUEST_S,
    STACK_BYTES,
    STATUS,
    Channel,
)

log = logging.getLogger(__name__)

_ROOT = Path(__file__).parents[2]
_MAIN = """
import pathlib, socket, sys
root, control, model, digest, cache, *stop_ids = sys.argv[1:]
sys.path.insert(0, root)
from edge.generation.grammar_worker import main
paths = pathlib.Path(model), digest, pathlib.Path(cache)
main(socket.socket(fileno=int(control)), *paths, [*map(int, stop_ids)])
"""
_POLL_MS = 50
_PATIENCE_S = 20.0  # for one operation on a busy machine; the worker's own limit counts processor time
_START_S = 120.0  # for the view of the vocabulary
_STUCK_S = 0.5  # without any progress of a child; llguidance deadlocks in places where it gets no memory
_END_S = 5.0
_MUCH_MEMORY = f"takes more than {(MEMORY_BYTES + STACK_BYTES) >> 20} MB of memory"

_TRIES = 3

Interrupted = Callable[[], str | None]


class WorkerKilled(EdgeError):
    """Something other than its own limits ended the worker."""


class GrammarWorker:
    """A worker for the vocabulary of one bundle, started when it is first needed. Not thread-safe."""

    def __init__(self, model: Path, digest: str, cache_directory: Path, stop_ids: Sequence[int]) -> None:
        """Arguments as for `edge.text.tokenizer.Tokenizer.open`; `stop_ids` end an answer."""
        self._process = _Process([str(model), digest, str(cache_directory), *map(str, stop_ids)])
        self._channel: Channel | None = None
        self._user: RemoteConstraint | None = None
        self._another_reply = False
        self._child = 0

    def constrain(
        self, answer_format: AnswerFormat, max_tokens: int, interrupted: Interrupted
    ) -> RemoteConstraint:
        """Begin an answer of at most `max_tokens` tokens; its format is compiled when it is first used.

        `interrupted` is polled while the worker computes; its reason to stop is raised as Interruption.
        """
        return RemoteConstraint(self, answer_format, max_tokens, interrupted)

    @property
    def pid(self) -> int | None:
        """The process, if it was started."""
        return self._process.pid

    def close(self) -> None:
        """End the process."""
        self._disconnect()
        self._process.close()

    def call(self, user: RemoteConstraint, operation: str, *arguments: Any) -> Any:
        """Carry out an operation of a constraint.

        Raises RequestError("bad_request") if the format can't be followed within the worker's limits,
        WorkerKilled if something else ended the worker, and Interruption.
        """
        if self._user is not user:
            self._finish_last_answer()
        if self._channel is None:
            self._connect(user.interrupted)
        try:
            if self._user is not user:
                self._user = None
                self._exchange(user.interrupted, "open", *user.position)
                self._user = user
            return self._exchange(user.interrupted, operation, *arguments)
        except (EOFError, ConnectionError):
            self._disconnect()
            status = self._connect(user.interrupted)
            raise _reason(status, user.fields) from None
        except TimeoutError as error:
            self._disconnect()
            raise _too_complex(user.fields, str(error)) from None
        except Interruption:
            self._disconnect()
            raise

    def _exchange(self, interrupted: Interrupted, operation: str, *arguments: Any) -> Any:
        channel = self._channel
        assert channel is not None
        wait = _waiting(interrupted, _PATIENCE_S, self._child)
        if self._another_reply and operation != "allowed":
            channel.receive(wait)
            self._another_reply = False
        if not self._another_reply:
            channel.send((operation, *arguments))
        result, self._another_reply, refusal = channel.receive(wait)
        if refusal is not None:
            raise RequestError("bad_request", refusal)
        return result

    def _finish_last_answer(self) -> None:
        """Drop a reply that the previous answer did not wait for; replace a child that is still computing.

        Otherwise the next answer would wait for it, and be refused if it passes the child's limits.
        """
        if self._channel is not None and self._another_reply:
            try:
                self._channel.receive(_waiting(lambda: None, 0.0))
                self._another_reply = False
            except (EOFError, ConnectionError, TimeoutError):
                self._disconnect()

    def _connect(self, interrupted: Interrupted) -> int:
        """Get a new child; returns how the last one ended."""
        status, self._child, end = self._process.new_child(interrupted)
        self._channel = Channel(end)
        return status

    def _disconnect(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._channel, self._user, self._another_reply = None, None, False


class RemoteConstraint:
    """An `edge.generation.constraint.Constraint` in a worker."""

    def __init__(
        self,
        worker: GrammarWorker,
        answer_format: AnswerFormat,
        max_tokens: int,
        interrupted: Interrupted,
    ) -> None:
        self.interrupted, self.fields = interrupted, answer_format.fields
        self._worker, self._format, self._max_tokens = worker, answer_format.to_json(), max_tokens
        self._taken: list[int] = []

    @property
    def position(self) -> tuple[str, int, list[int]]:
        """The format, the most tokens of the answer, and those that were taken: enough to continue it."""
        return self._format, self._max_tokens, self._taken

    def take(self, token: int, follow: bool = True) -> Step:
        """Take a token, or the one that is needed instead to complete the answer in time."""
        step = Step(*self._call("take", token, follow))
        return self._noted(step, follow)

    def follow(self) -> Step:
        """Take the tokens that are forced here."""
        return self._noted(Step(*self._call("follow")), True)

    def allowed(self) -> list[int] | None:
        """Return the ids that may come next, if they are few."""
        ids: list[int] | None = self._call("allowed")
        return ids

    def mask(self) -> bytes:
        """Return a bit for each id that may come next, lowest bit first."""
        bits: bytes = self._call("mask")
        return bits

    def allowed_among(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return the first `count` of `tokens` that may come next."""
        ids: list[int] = self._call("allowed_among", tokens, count)
        return ids

    def validate(self, tokens: Sequence[int]) -> int:
        """Return how many of `tokens` could be taken one after the other."""
        count: int = self._call("validate", tokens)
        return count

    def _call(self, operation: str, *arguments: Any) -> Any:
        for _ in range(_TRIES - 1):
            try:
                return self._worker.call(self, operation, *arguments)
            except WorkerKilled as killed:
                log.warning("%s; it is replaced", killed)
        return self._worker.call(self, operation, *arguments)

    def _noted(self, step: Step, followed: bool) -> Step:
        if step.token is not None and step.consumed:
            self._taken.append(step.token)
        if followed:
            self._taken += step.forced
        return step


class _Process:
    """The worker process and its control socket."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._asked = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def new_child(self, interrupted: Interrupted) -> tuple[int, int, socket.socket]:
        """Replace the child; returns how the last one ended, and the new one's process id and socket.

        Raises WorkerKilled if the worker has ended, EdgeError if it can't be started, and Interruption.
        """
        control = self._control or self._start()
        try:
            if not self._asked:
                control.send(b"\0")
                self._asked = True
            _waiting(interrupted, _START_S)(control)
            content, sockets, _, _ = socket.recv_fds(control, STATUS.size, 1)
        except (TimeoutError, OSError):
            content = b""
        if not content:
            self.close()
            raise WorkerKilled("the grammar worker ended or hangs")
        self._asked = False
        status, child = STATUS.unpack(content)
        return status, child, socket.socket(fileno=sockets[0])

    def close(self) -> None:
        """End the process."""
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._control = self._process = None
        self._asked = False

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-I", "-c", _MAIN, str(_ROOT), str(theirs.fileno()), *self._arguments]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        except OSError as error:
            ours.close()
            raise EdgeError(f"the grammar worker can't be started: {error.strerror}; free memory") from error
        finally:
            theirs.close()
        self._control = ours
        return ours


def _waiting(
    interrupted: Interrupted, patience_s: float, child: int | None = None
) -> Callable[[socket.socket], None]:
    """Return a function that waits until a socket can be read.

    It raises Interruption, or TimeoutError with the reason: `patience_s` have passed, or `child` is stuck.
    """
    until = time.monotonic() + patience_s

    def wait(end: socket.socket) -> None:
        poll = select.poll()
        poll.register(end, select.POLLIN)
        progress, seen = -1.0, 0.0
        while not poll.poll(_POLL_MS):
            reason = interrupted()
            if reason is not None:
                raise Interruption(reason)
            now = time.monotonic()
            if now > until:
                raise TimeoutError(f"takes more than {patience_s:.0f} s")
            if child is None:
                continue
            used = _processor_s(child)
            if used != progress:
                progress, seen = used, now
            elif now - seen > _STUCK_S:
                raise TimeoutError(_MUCH_MEMORY)

    return wait


def _processor_s(process: int) -> float:
    """Return the processor time of another process; see `clock_getcpuclockid` in glibc."""
    with contextlib.suppress(OSError):
        return time.clock_gettime(~process << 3 | 2)
    return 0.0


def _reason(status: int, fields: str) -> EdgeError:
    """Return the error for a child that ended in the middle of an operation."""
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number == signal.SIGPROF:
        return _too_complex(fields, f"takes more than {REQUEST_S:.0f} s of processor time")
    out_of_memory = os.WIFEXITED(status) and os.WEXITSTATUS(status) == OUT_OF_MEMORY
    if out_of_memory or number in (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS):
        return _too_complex(fields, _MUCH_MEMORY)
    if number:
        return WorkerKilled(f"the grammar worker was ended by {signal.Signals(number).name}")
    return EdgeError("the grammar worker failed")


def _too_complex(fields: str, why: str) -> RequestError:
    return RequestError("bad_request", f"{fields}: too complex: {why}; describe less at once")
