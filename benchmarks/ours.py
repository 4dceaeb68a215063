"""This project among the engines that are compared: a bundle, measured as its users run it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import models, startup
from benchmarks.processes import Memory, Worker
from benchmarks.tasks import CONTEXT, Answered, Task, Tasks
from edge.bundles.bundle import read_manifest


class Ours:
    """A bundle, with its packed weights and prefix caches in a directory that lasts for one run."""

    def __init__(self, recipe: str, model: str, threads: int, tasks: Tasks) -> None:
        """Convert if that is due, start for the first time, and load the model into a worker."""
        self.name, self._tasks, self._threads = f"edge {recipe}", tasks, threads
        self._bundle = models.bundle(recipe, model)
        self._directory = tempfile.TemporaryDirectory(prefix=f"edge-bench-{recipe}-")
        self._cache = Path(self._directory.name)
        quantization = read_manifest(self._bundle).quantization
        self.facts: Mapping[str, Any] = {
            "bits": {"int4": 4, "int8": 8}[recipe],
            "ours": True,
            "bytes_per_token": quantization["bytes_per_token"],
        }
        self._first_ready_s = self._ready()
        command = [sys.executable, "-m", "benchmarks.edge_worker"]
        arguments = [self._bundle, self._cache, threads, CONTEXT]
        self._worker = Worker([*command, *map(str, arguments)])
        self._answered = Answered()
        self._answer("alarm", 0)  # the first one builds the grammar engine's vocabulary
        self._memory: Memory | None = None

    def measures(self) -> dict[str, Callable[[int], float]]:
        """By key of `results.MEASURES`: a function from the round to a value."""
        tasks = self._tasks
        return {
            "prefill_128": lambda _: self._rate("prefill", tokens=128),
            "prefill_512": lambda _: self._rate("prefill", tokens=512),
            "decode": lambda _: self._rate("decode", tokens=128, after=512),
            "first_token_new": lambda i: self._first_token(tasks.new(i)),
            "first_token_repeated": lambda i: self._first_token(tasks.repeated(i)),
            **{f"json_{kind}": partial(self._answer, kind) for kind in tasks.kinds},
            "json_all": lambda _: self._answered.overall_rate,
            "json_valid": lambda _: self._answered.valid_share,
            "first_ready": lambda _: self._first_ready_s,
            "ready": lambda _: self._ready(),
            "text": lambda i: self._first_text(tasks.short(i)),
            "text_repeated": lambda i: self._first_text(tasks.repeated(i)),
            "anonymous": lambda _: self._filled().anonymous,
            "peak": lambda _: self._filled().peak,
        }

    def close(self) -> None:
        """End the worker and remove the caches."""
        self._worker.close()
        self._directory.cleanup()

    def _rate(self, what: str, **arguments: int) -> float:
        return float(self._worker.ask(what, **arguments)["tps"])

    def _ask(self, task: Task, schema: object, max_tokens: int) -> dict[str, Any]:
        return self._worker.ask(
            "answer", system=task.system, user=task.user, schema=schema, max_tokens=max_tokens
        )

    def _first_token(self, task: Task) -> float:
        return float(self._ask(task, None, 1)["seconds"])

    def _answer(self, kind: str, turn: int) -> float:
        """Tokens per second of a JSON answer whose system prompt was used just before."""
        before, task = self._tasks.sensor(kind, turn)
        self._first_token(before)
        said = self._ask(task, task.schema, self._tasks.max_tokens)
        return self._answered.rate(self._tasks, task, said["text"], said["seconds"])

    def _daemon(self) -> startup.Daemon:
        return startup.Daemon(self._bundle, self._cache, self._threads, CONTEXT)

    def _ready(self) -> float:
        with self._daemon() as daemon:
            return daemon.ready_s

    def _first_text(self, task: Task) -> float:
        command = startup.ask_command(self._bundle, task)
        return startup.first_text_s(command, {"CACHE_DIRECTORY": str(self._cache)})

    def _filled(self) -> Memory:
        if self._memory is None:
            with self._daemon() as daemon:
                self._memory = startup.filled_memory(daemon, CONTEXT)
        return self._memory
