"""A generator for tests of the code around it: it spells words backwards and can be paused."""

import threading
from collections.abc import Callable, Iterator

from edge.errors import RequestError, RuntimeFailure
from edge.generation.generator import Completion, Delta
from edge.protocol.messages import Request, Timings, Usage

WAIT_S = 30


class Speller:
    """Answers a prompt with its words backwards, one word a step; `gate` holds a step until it is set."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.at_gate = threading.Semaphore(0)
        self.asked: list[str] = []

    def generate(
        self, request: Request, interrupted: Callable[[], str | None], client: str | None
    ) -> Iterator[Delta | Completion]:
        assert request.prompt is not None
        self.asked.append(request.id)
        text, reason = "", "stop"
        for word in request.prompt.split():
            self.step(word)
            if not self.gate.is_set():
                self.at_gate.release()
            while not self.gate.is_set() and interrupted() is None:
                self.gate.wait(0.01)
            if (stopped := interrupted()) is not None:
                reason = stopped
                break
            said = ("x" * 20_000 if word == "MUCH" else word[::-1]) + " "
            text += said
            yield Delta(said, "")
        count = len(text.split())
        yield Completion(text, reason, Usage(1, 0, 0, count), Timings(0.0, 1.0, 1.0, 1.0), None, ())

    def step(self, word: str) -> None:
        errors: dict[str, Exception] = {
            "CRASH": ZeroDivisionError("division by zero"),
            "LITERT": RuntimeFailure("Invoke failed on decoder.tflite"),
            "LONG": RequestError("too_long", "9 tokens, at most 8 fit"),
        }
        if word in errors:
            raise errors[word]

    def wait_until_held(self) -> None:
        """Wait until a request is paused at the closed gate."""
        assert self.at_gate.acquire(timeout=WAIT_S)
