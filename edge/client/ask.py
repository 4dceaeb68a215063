"""One request from the command line: shows the answer as it arrives."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

from edge.client.link import Link
from edge.errors import TransportError
from edge.protocol.messages import Failure, Final, Partial, Request

GRACE_S = 10.0  # after the deadline, for the answer that reports it
CANCEL_S = 3.0  # for a cancelled request to end
INCOMPLETE = ("deadline", "cancelled")  # finish reasons of an answer that was cut off


def ask(link: Link, request: Request, as_json: bool, statistics: bool) -> Final | Failure:
    """Send the request, show the answer and return its end. Raises TransportError."""
    patience_s = None if request.deadline_ms is None else request.deadline_ms / 1000 + GRACE_S
    show = _Json() if as_json else _Text(sys.stdout.isatty())
    with _cancelling(link, request.id):
        for answer in link.ask(request, patience_s):
            if isinstance(answer, Partial):
                show.partial(answer)
                continue
            show.end(answer)
            if statistics and isinstance(answer, Final):
                click.echo(_statistics(answer), err=True)
            return answer
    raise TransportError("the connection ended without an answer")


class _Json:
    """Shows the final or error as one line of JSON, and nothing else."""

    def partial(self, answer: Partial) -> None:
        """Ignore a partial: the final has the whole text."""

    def end(self, answer: Final | Failure) -> None:
        """Print the answer."""
        click.echo(answer.to_json())


class _Text:
    """Shows text, on a terminal as it arrives; the final fills in for lost partials."""

    def __init__(self, live: bool) -> None:
        self._live = live
        self._shown = ""
        self._next = 0

    def partial(self, answer: Partial) -> None:
        """Print a partial if none before it is missing."""
        if self._live and answer.seq == self._next:
            self._next += 1
            self._shown += answer.text
            click.echo(_harmless(answer.text), nl=False)
            sys.stdout.flush()

    def end(self, answer: Final | Failure) -> None:
        """Print the rest of the text, or the error."""
        if isinstance(answer, Failure):
            self._end_line()
            retry = f" (try again in {answer.retry_after_ms} ms)" if answer.retry_after_ms else ""
            click.echo(f"Error: {answer.code}: {_harmless(answer.message)}{retry}", err=True)
            return
        if not answer.text.startswith(self._shown):
            self._end_line()
            self._shown = ""
        click.echo(_harmless(answer.text[len(self._shown) :]))
        for call in answer.tool_calls:
            click.echo(f"{call.name}({_harmless(str(dict(call.arguments)))})")
        if answer.finish_reason in INCOMPLETE:
            click.echo(f"Error: the answer is not complete: {answer.finish_reason}", err=True)

    def _end_line(self) -> None:
        if self._shown:
            click.echo()


def _harmless(text: str) -> str:
    """Remove control characters, which could change the terminal's state, except newline and tab."""
    return "".join(c for c in text if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))


def _statistics(final: Final) -> str:
    usage, times = final.usage, final.timings
    return (
        f"{usage.prompt} prompt tokens ({usage.cached} cached), {usage.generated} generated "
        f"at {final.tokens_per_s or 0.0}/s, queue {times.queue_ms:.0f} ms, "
        f"first token after {times.first_token_ms:.0f} ms"
    )


@contextmanager
def _cancelling(link: Link, request_id: str) -> Iterator[None]:
    """Let the first Ctrl-C cancel the request.

    A second one raises KeyboardInterrupt, and so does a wait of CANCEL_S for the answer to end.
    """
    ended = threading.Event()

    def cancel() -> None:
        if not link.cancel(request_id) or not ended.wait(CANCEL_S):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, previous)
        # In a thread, because the interrupted code may hold a lock that cancelling needs.
        threading.Thread(target=cancel, daemon=True).start()

    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        ended.set()
        signal.signal(signal.SIGINT, previous)
