"""Runs a bundle in the client's own process, without a daemon; a `Link` of `edge.client.link`."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

from edge import defaults
from edge.client.link import next_event, until_s
from edge.protocol.messages import Answer, Partial, Request
from edge.runtime.opening import Opening


class BundleLink:
    """A bundle in this process."""

    def __init__(self, directory: Path, threads: int | None = None) -> None:
        """Open the bundle. Raises BundleError or RuntimeFailure."""
        cache, threads = Path(defaults.cache_directory()), threads or defaults.threads()
        opening = Opening(directory, cache, threads)
        from edge.generation.generator import Generator  # these two bring numpy
        from edge.requests.engine import Engine

        self._answers: queue.Queue[Answer] = queue.Queue()
        bundle, compiled = opening.result()
        generator = Generator(bundle, cache, threads, None, compiled)
        self._engine = Engine(generator, queue_length=1, partial_interval_s=0)
        self._engine.start()

    def ask(self, request: Request, patience_s: float | None = None) -> Iterator[Answer]:
        """Answer `request`."""
        until = until_s(patience_s)
        self._engine.submit("", request, self._answers.put)
        while True:
            answer = next_event(self._answers, until)
            if answer is not None:
                yield answer
                if not isinstance(answer, Partial):
                    return

    def cancel(self, request_id: str) -> bool:
        """Cancel at the next decode step."""
        self._engine.cancel("", request_id)
        return True

    def close(self) -> None:
        """Stop the engine."""
        self._engine.stop(0)
