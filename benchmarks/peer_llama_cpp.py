"""llama.cpp among the engines: its own programs, each for what it is made for.

`llama-bench` for prefill and decode, `llama-server` for requests (its grammar engine tries the drawn token
first, and it keeps prompts), `llama-completion` for the start of a process, `llama-quantize` for models.
"""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click

from benchmarks import models, startup
from benchmarks.processes import PATIENCE_S, Memory, memory_of
from benchmarks.tasks import CONTEXT, Answered, Task, Tasks

PROGRAMS = ("llama-bench", "llama-server", "llama-completion", "llama-quantize")
TYPES = {"int4": "Q4_0", "int8": "Q8_0"}


def find() -> Path | None:
    """The directory on PATH that has llama.cpp's programs, if it has them all."""
    found = shutil.which(PROGRAMS[0])
    directory = Path(found).parent if found else None
    complete = directory is not None and all((directory / name).is_file() for name in PROGRAMS)
    return directory if complete else None


class LlamaCpp:
    """A model in one of llama.cpp's types; its embedding is Q8_0, as our heads are int8."""

    def __init__(self, programs: Path, recipe: str, model: str, threads: int, tasks: Tasks) -> None:
        """Quantise if that is due and start a server. Raises ClickException that names what is missing."""
        for name in PROGRAMS:
            if not (programs / name).is_file():
                raise click.ClickException(f"{programs / name}: not there; build llama.cpp's target {name}")
        self.name = f"llama.cpp {TYPES[recipe]}"
        self.facts: Mapping[str, Any] = {"bits": {"int4": 4, "int8": 8}[recipe]}
        self._programs, self._threads, self._tasks = programs, threads, tasks
        real = model == models.REAL
        self._model = self._quantized(TYPES[recipe]) if real else models.checkpoint(model)
        self._directory = tempfile.TemporaryDirectory(prefix="edge-bench-llama-")
        self._answered = Answered()
        self._server = Server(self._server_command())
        self._answer("alarm", 0)
        self._memory: Memory | None = None

    def measures(self) -> dict[str, Callable[[int], float]]:
        """By key of `results.MEASURES`: a function from the round to a value."""
        tasks = self._tasks
        return {
            "prefill_128": lambda _: self._bench("-p", "128", "-n", "0"),
            "prefill_512": lambda _: self._bench("-p", "512", "-n", "0"),
            "decode": lambda _: self._bench("-p", "0", "-n", "128", "-d", "512"),
            "first_token_new": lambda i: self._first_token(tasks.new(i)),
            "first_token_repeated": lambda i: self._first_token(tasks.repeated(i)),
            **{f"json_{kind}": partial(self._answer, kind) for kind in tasks.kinds},
            "json_all": lambda _: self._answered.overall_rate,
            "json_valid": lambda _: self._answered.valid_share,
            "ready": lambda _: self._ready(),
            "text": lambda i: startup.first_text_s(self._completion(tasks.short(i)), {}),
            "text_repeated": self._text_repeated,
            "anonymous": lambda _: self._filled().anonymous,
            "peak": lambda _: self._filled().peak,
        }

    def close(self) -> None:
        """End the server."""
        self._server.close()
        self._directory.cleanup()

    def _quantized(self, kind: str) -> Path:
        target = models.CACHE / f"270m-{kind}.gguf"
        if not target.exists():
            click.echo(f"quantising the 270M to {kind}", err=True)
            scratch = target.with_suffix(".part")
            types = ["--output-tensor-type", "q8_0", "--token-embedding-type", "q8_0"]
            source = [str(models.checkpoint()), str(scratch), kind]
            _run([str(self._programs / "llama-quantize"), "--allow-requantize", *types, *source])
            scratch.rename(target)
        return target

    def _model_options(self, threads_of_prefill: bool = True) -> list[str]:
        batch = ["-tb", str(self._threads)] if threads_of_prefill else []
        return ["-m", str(self._model), "-t", str(self._threads), *batch]

    def _bench(self, *what: str) -> float:
        """Tokens per second of one run."""
        options = self._model_options(threads_of_prefill=False)
        command = [str(self._programs / "llama-bench"), *options, *what, "-r", "1", "-o", "json"]
        return float(json.loads(_run(command))[0]["avg_ts"])

    def _server_command(self) -> list[str]:
        limits = ["-c", str(CONTEXT), "-np", "1"]
        return [str(self._programs / "llama-server"), *self._model_options(), *limits]

    def _completion(self, task: Task, *options: str) -> list[str]:
        """A process that ends after the first token."""
        quiet = ["-no-cnv", "--no-display-prompt", "--no-warmup", "--temp", "0", "-c", str(CONTEXT)]
        one = ["-n", "1", "-p", task.text, *options]
        return [str(self._programs / "llama-completion"), *self._model_options(), *quiet, *one]

    def _text_repeated(self, turn: int) -> float:
        """Start to first text with the state of a prompt that shares the system prompt, kept in a file."""
        kept = Path(self._directory.name, f"prompt-{turn}")
        startup.first_text_s(self._completion(self._tasks.new(turn), "--prompt-cache", str(kept)), {})
        command = self._completion(
            self._tasks.repeated(turn), "--prompt-cache", str(kept), "--prompt-cache-ro"
        )
        return startup.first_text_s(command, {})

    def _first_token(self, task: Task) -> float:
        return self._server.complete(task.text, 1)[1]

    def _answer(self, kind: str, turn: int) -> float:
        """Tokens per second of a JSON answer whose system prompt was used just before."""
        before, task = self._tasks.sensor(kind, turn)
        self._first_token(before)
        text, taken = self._server.complete(task.text, self._tasks.max_tokens, json_schema=task.schema)
        return self._answered.rate(self._tasks, task, text, taken)

    def _ready(self) -> float:
        server = Server(self._server_command())
        server.close()
        return server.ready_s

    def _filled(self) -> Memory:
        if self._memory is None:
            server = Server(self._server_command())
            server.complete(startup.text_of(CONTEXT - 64), 60)
            self._memory = server.memory()
            server.close()
        return self._memory


class Server:
    """A running `llama-server`. `ready_s`: seconds from the start of the process to its first 200."""

    def __init__(self, command: list[str]) -> None:
        """Start it and wait until it is healthy."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(self._port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not self._healthy():
            if self._process.poll() is not None or time.perf_counter() - started > PATIENCE_S:
                raise click.ClickException(f"{' '.join(command)}: does not start")
            time.sleep(0.002)
        self.ready_s = time.perf_counter() - started

    def complete(self, prompt: str, tokens: int, **options: Any) -> tuple[str, float]:
        """The greedy completion of a prompt, and seconds from request to answer."""
        body = {"prompt": prompt, "n_predict": tokens, "cache_prompt": True, **options}
        body |= {"temperature": 0, "samplers": ["top_k"], "top_k": 1}
        started = time.perf_counter()
        status, answer = self._request("POST", "/completion", json.dumps(body), PATIENCE_S)
        taken = time.perf_counter() - started
        if status != 200:
            raise click.ClickException(f"llama-server: {answer[:200]}")
        return str(json.loads(answer)["content"]), taken

    def memory(self) -> Memory:
        """The server's memory."""
        return memory_of(self._process.pid)

    def close(self) -> None:
        """End the server."""
        self._process.terminate()
        self._process.wait(30)

    def _healthy(self) -> bool:
        try:
            return self._request("GET", "/health", None, 5)[0] == 200
        except OSError:
            return False

    def _request(self, method: str, path: str, body: str | None, timeout_s: float) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=timeout_s)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()


def _run(command: list[str]) -> str:
    """What a program prints. Raises ClickException with the end of its errors if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{command[0]}: {done.stderr[-300:]}")
    return done.stdout
