"""One question from the command line: shows the answer as it comes, and says by exit code how it went."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

from edge.client.link import Link
from edge.protocol.messages import Failure, Final, Partial, Request

EXIT_CODES = {
    "bad_request": 8,
    "too_long": 8,
    "busy": 9,
    "unavailable": 9,
    "expired": 10,
    "deadline": 10,
    "internal": 11,
    "cancelled": 130,
}
GRACE_S = 10.0  # beyond the deadline, for the answer that says it has passed


def ask(link: Link, request: Request, as_json: bool, statistics: bool) -> int:
    """Ask, show the answer, and return the exit code. Raises TransportError."""
    patience_s = None if request.deadline_ms is None else request.deadline_ms / 1000 + GRACE_S
    show = _Json() if as_json else _Text(sys.stdout.isatty())
    with _cancelling(link, request.id):
        for answer in link.ask(request, patience_s):
            if isinstance(answer, Partial):
                show.partial(answer)
                continue
            show.last(answer)
            if isinstance(answer, Failure):
                return EXIT_CODES.get(answer.code, 1)
            if statistics:
                click.echo(_statistics(answer), err=True)
            return EXIT_CODES.get(answer.finish_reason, 0)
    return 1


class _Json:
    """Shows the last answer as one line of JSON, and nothing else."""

    def partial(self, answer: Partial) -> None:
        """Ignore a part: the last answer has it all."""

    def last(self, answer: Final | Failure) -> None:
        """Print the answer."""
        click.echo(answer.to_json())


class _Text:
    """Shows text, on a terminal as it comes; parts that were lost on the way are made up for at the end."""

    def __init__(self, live: bool) -> None:
        self._live = live
        self._shown = ""
        self._next = 0

    def partial(self, answer: Partial) -> None:
        """Print a part, if none before it is missing."""
        if self._live and answer.seq == self._next:
            self._next += 1
            self._shown += answer.text
            click.echo(_harmless(answer.text), nl=False)
            sys.stdout.flush()

    def last(self, answer: Final | Failure) -> None:
        """Print what is missing, or the error."""
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
        if answer.finish_reason in EXIT_CODES:
            click.echo(f"Error: the answer is not complete: {answer.finish_reason}", err=True)

    def _end_line(self) -> None:
        if self._shown:
            click.echo()


def _harmless(text: str) -> str:
    """Without control characters, which could change the terminal's state; line ends and tabs stay."""
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
    """Let the first Ctrl-C cancel the request, and the second end the program."""

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # In a thread, because the interrupted code may hold a lock that cancelling needs.
        threading.Thread(target=link.cancel, args=(request_id,), daemon=True).start()

    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
