"""What every engine is asked, with the same texts for all of them, and how answers are counted."""

from __future__ import annotations

import json
import time
from pathlib import Path

from benchmarks import workload
from benchmarks.workload import SensorRequest
from edge.bundle import TOKENIZER
from edge.tokenizer import Tokenizer

CONTEXT = 2048
_DOMAINS = {"alarm": "weather", "summary": "greenhouses", "classification": "batteries"}


class Tasks:
    """The texts of one run; no engine, and no cache on disk, has seen its system prompts before."""

    kinds = tuple(_DOMAINS)
    max_tokens = workload.MAX_TOKENS

    def __init__(self, bundle: Path) -> None:
        """Take the tokenizer of a bundle to count with."""
        self._tokenizer = Tokenizer((bundle / TOKENIZER).read_bytes())
        self._run = f"{time.time_ns() // 1_000_000:x}"
        self._system = workload.of("pumps", "alarm")[0].system

    def new(self, turn: int) -> str:
        """A request of 950 tokens with a system prompt that is new in this turn."""
        return self._ask(turn, "P1 duty, all readings normal. What is its state?")

    def repeated(self, turn: int) -> str:
        """Another request with the system prompt of `new`."""
        return self._ask(turn, "P2 rests, its seal drips 31 times a minute. What is to be done?")

    def short(self, turn: int) -> str:
        """A request of a few tokens."""
        return f"Pump {turn % 3} has a discharge pressure of"

    def sensor(self, kind: str, turn: int) -> tuple[SensorRequest, SensorRequest]:
        """Two requests of the workload with the same system prompt and schema, others in the next turn."""
        choice = workload.of(_DOMAINS[kind], kind)
        return choice[turn % len(choice)], choice[(turn + 1) % len(choice)]

    def tokens(self, text: str) -> int:
        """Tokens of a text, by Gemma's own tokenizer, whoever wrote it."""
        return len(self._tokenizer.encode(text))

    def _ask(self, turn: int, question: str) -> str:
        return f"Site {self._run}-{turn}. {self._system}\n\nReadings:\n{question}\n\nAnswer:"


class Answered:
    """JSON answers of one engine: how fast they came and how many were valid."""

    def __init__(self) -> None:
        self._valid = self._all = 0

    @property
    def valid_share(self) -> float:
        """Percent of the answers that were JSON objects with all members that the schema requires."""
        return 100 * self._valid / max(self._all, 1)

    def rate(self, tasks: Tasks, task: SensorRequest, text: str, seconds: float) -> float:
        """Note an answer; returns its tokens per second, from the request on."""
        self._all += 1
        self._valid += _is_valid(text, task)
        return tasks.tokens(text) / seconds


def _is_valid(text: str, task: SensorRequest) -> bool:
    try:
        answer = json.loads(text)
    except ValueError:
        return False
    return isinstance(answer, dict) and set(answer) == set(task.schema["required"])
