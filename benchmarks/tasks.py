"""The tasks, with the same texts for every engine, and the counting of answers."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import workload
from edge.bundles.bundle import TOKENIZER
from edge.text.tokenizer import Tokenizer

CONTEXT = 2048
_DOMAINS = {"alarm": "weather", "summary": "greenhouses", "classification": "batteries"}


@dataclass(frozen=True)
class Task:
    """A system prompt, what a user says, and perhaps the JSON schema of the answer."""

    system: str
    user: str
    schema: Mapping[str, Any] | None = None

    @property
    def text(self) -> str:
        """The same as one text, for engines that get no messages; without turns, so it is no longer."""
        return f"{self.system}\n\n{self.user}\n".lstrip()


class Tasks:
    """The tasks of one run; no engine, and no cache on disk, has seen its system prompts before."""

    kinds = tuple(_DOMAINS)
    max_tokens = workload.MAX_TOKENS

    def __init__(self, bundle: Path) -> None:
        """Take the tokenizer of a bundle to count with."""
        self._tokenizer = Tokenizer((bundle / TOKENIZER).read_bytes())
        self._run = f"{time.time_ns() // 1_000_000:x}"
        self._system = workload.of("pumps", "alarm")[0].system

    def new(self, turn: int) -> Task:
        """A request of 950 tokens with a system prompt that is new in this turn."""
        return Task(self._new_system(turn), "P1 duty, all readings normal. What is its state?")

    def repeated(self, turn: int) -> Task:
        """Another request with the system prompt of `new`."""
        return Task(self._new_system(turn), "P2 rests, its seal drips 31 times a minute. What is to be done?")

    def short(self, turn: int) -> Task:
        """A request of a few tokens."""
        return Task("", f"Pump {turn} has a discharge pressure of 9 bar. Is that normal?")

    def sensor(self, kind: str, turn: int) -> tuple[Task, Task]:
        """Two requests of the workload with the same system prompt and schema, others in the next turn."""
        choice = [
            Task(item.system, f"Readings:\n{item.readings}", item.schema)
            for item in workload.of(_DOMAINS[kind], kind)
        ]
        return choice[turn % len(choice)], choice[(turn + 1) % len(choice)]

    def tokens(self, text: str) -> int:
        """The number of tokens of any engine's text, by Gemma's own tokenizer."""
        return len(self._tokenizer.encode(text))

    def _new_system(self, turn: int) -> str:
        return f"Site {self._run}-{turn}. {self._system}"


class Answered:
    """JSON answers of one engine: how fast they came and how many were valid."""

    def __init__(self) -> None:
        self._valid = self._all = 0
        self._latest: deque[tuple[int, float]] = deque(maxlen=len(Tasks.kinds))

    @property
    def valid_share(self) -> float:
        """Percent of the answers that were JSON objects with all members that the schema requires."""
        return 100 * self._valid / max(self._all, 1)

    @property
    def overall_rate(self) -> float:
        """Tokens per second of the latest answer of each kind, with all that had to be set up for them."""
        tokens, seconds = zip(*self._latest, strict=True)
        return float(sum(tokens) / sum(seconds))

    def rate(self, tasks: Tasks, task: Task, text: str, seconds: float, setup_s: float = 0.0) -> float:
        """Note an answer; returns its tokens per second, from the request on, without set-up."""
        self._all += 1
        self._valid += _is_valid(text, task)
        self._latest.append((tasks.tokens(text), seconds + setup_s))
        return tasks.tokens(text) / seconds


def _is_valid(text: str, task: Task) -> bool:
    assert task.schema is not None
    try:
        answer = json.loads(text)
    except ValueError:
        return False
    return isinstance(answer, dict) and set(answer) == set(task.schema["required"])
