"""LiteRT-LM among the engines, through its Python API in an interpreter that has `litert-lm-api`."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click

from benchmarks import startup
from benchmarks.processes import Memory, Worker
from benchmarks.tasks import Answered, Task, Tasks

CACHE_LENGTH = 1024
"""Tokens that the model must be exported for: its speed falls with the length of the exported cache."""

COMPACT = {"x-guidance": {"whitespace_flexible": False}}
"""For llguidance: no white space in JSON. By default it allows any, and a base model writes little else."""

WORKER = Path(__file__).with_name("peer_litert_lm_worker.py")


class LiteRtLm:
    """One of its model files. Its own cache of packed weights is there before anything is measured."""

    def __init__(self, python: Path, model: Path, recipe: str, threads: int, tasks: Tasks) -> None:
        """Load the model into a worker. Raises ClickException if it can't be loaded."""
        if not model.is_file():
            raise click.ClickException(f"{model}: not there; give the .litertlm file that export_hf wrote")
        self.name = f"LiteRT-LM {recipe}"
        self.facts: Mapping[str, Any] = {"bits": {"int4": 4, "int8": 8}[recipe]}
        self._python, self._model, self._threads, self._tasks = python, model, threads, tasks
        self._directory = tempfile.TemporaryDirectory(prefix="edge-bench-litert-lm-")
        self._answered = Answered()
        self._setup_s = 0.0
        self._worker = self._serve()
        self._answer("alarm", 0)
        self._memory: Memory | None = None

    def measures(self) -> dict[str, Callable[[int], float]]:
        """By key of `results.MEASURES`: a function from the round to a value."""
        tasks = self._tasks
        return {
            "prefill_128": lambda _: self._bench(128, 8)["prefill_tps"],
            "prefill_512": lambda _: self._bench(512, 8)["prefill_tps"],
            "decode": lambda _: self._bench(512, 128)["decode_tps"],
            "first_token_new": lambda i: self._first_token(tasks.new(i)),
            "first_token_repeated": lambda i: self._first_token(tasks.repeated(i)),
            **{f"json_{kind}": partial(self._answer, kind) for kind in tasks.kinds},
            "json_setup": lambda _: self._setup_s,
            "json_all": lambda _: self._answered.overall_rate,
            "json_valid": lambda _: self._answered.valid_share,
            "ready": lambda _: self._ready(),
            "text": lambda i: self._first_text(tasks.short(i)),
            "text_repeated": lambda i: self._first_text(tasks.repeated(i)),
            "anonymous": lambda _: self._filled().anonymous,
            "peak": lambda _: self._filled().peak,
        }

    def close(self) -> None:
        """End the worker."""
        self._worker.close()
        self._directory.cleanup()

    def _command(self, mode: str, *arguments: str) -> list[str]:
        common = [str(self._model), self._directory.name, str(self._threads)]
        return [str(self._python), str(WORKER), mode, *common, *arguments]

    def _serve(self) -> Worker:
        return Worker(self._command("serve"))

    def _bench(self, prefill: int, decode: int) -> dict[str, float]:
        """Its own benchmark, in a process of its own."""
        command = self._command("bench", str(prefill), str(decode))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        line = next((line for line in done.stdout.splitlines() if line.startswith("{")), None)
        if line is None:
            raise click.ClickException(f"{WORKER.name}: {done.stderr[-300:]}")
        result: dict[str, float] = json.loads(line)
        return result

    def _first_token(self, task: Task) -> float:
        return float(self._worker.ask("answer", text=task.text, schema=None, max_tokens=1)["seconds"])

    def _answer(self, kind: str, turn: int) -> float:
        """Tokens per second of a JSON answer, without its set-up; nothing is kept of earlier requests."""
        task = self._tasks.sensor(kind, turn)[1]
        schema = {**(task.schema or {}), **COMPACT}
        said = self._worker.ask("answer", text=task.text, schema=schema, max_tokens=self._tasks.max_tokens)
        self._setup_s = float(said["setup"])
        return self._answered.rate(self._tasks, task, said["text"], said["seconds"], self._setup_s)

    def _ready(self) -> float:
        worker = self._serve()
        worker.close()
        return worker.ready_s

    def _first_text(self, task: Task) -> float:
        return startup.first_text_s(self._command("first", task.text), {})

    def _filled(self) -> Memory:
        """Memory after a request that fills what the exported cache holds."""
        if self._memory is None:
            worker = self._serve()
            worker.ask("answer", text=startup.text_of(CACHE_LENGTH - 64), schema=None, max_tokens=60)
            self._memory = worker.memory()
            worker.close()
        return self._memory
