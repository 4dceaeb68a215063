"""`python -m fuzz.run TARGET...`: fuzz each target with atheris (libFuzzer) for some seconds.

Inputs that reach new code are kept in `.cache/fuzz/TARGET`, where the next run starts. An input that breaks a
promise stops the run and is printed; add it to the target's seeds, or write a test for it.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import atheris
import click

ONE = "EDGE_FUZZ_TARGET"  # libFuzzer ends its process, so each target gets one

with (
    atheris.instrument_imports(include=["edge", "fuzz", "tomllib", "jmespath"])
    if ONE in os.environ
    else nullcontext()
):
    from fuzz.targets import TARGETS, Target

CORPUS = Path(".cache/fuzz")
INPUT_BYTES = 2048  # the longest input
INPUT_CPU_S = 10.0  # more processor time than this for an input is a failure
INPUT_S = 600  # of wall-clock time, which libFuzzer measures: for an input that does not end
MEMORY_MB = 2048


@click.command()
@click.argument("names", metavar="TARGET...", nargs=-1, type=click.Choice(list(TARGETS)))
@click.option("--seconds", default=60, show_default=True, help="How long to fuzz each target.")
def main(names: tuple[str, ...], seconds: int) -> None:
    """Fuzz each TARGET; without one, all."""
    failed = []
    for name in names or TARGETS:
        log = CORPUS / f"{name}.log"
        command = [sys.executable, "-m", "fuzz.run", *_options(name, TARGETS[name], seconds)]
        with log.open("w") as file:
            code = subprocess.run(command, stderr=file, env=os.environ | {ONE: name}, check=False).returncode
        said = log.read_text(errors="replace")
        runs, reached = (re.search(rf"{key}:? +(\d+)", said) for key in ("executed_units", "DONE +cov"))
        click.echo(
            f"{name}: {runs[1]} inputs, {reached[1]} branches reached" if runs and reached else said[-3000:]
        )
        if code:
            failed.append(name)
    if failed:
        raise click.ClickException(f"broken: {', '.join(failed)}; the input is in {CORPUS}")


def _options(name: str, target: Target, seconds: int) -> list[str]:
    """Write seeds and dictionary where libFuzzer reads them; return its command line."""
    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = CORPUS / f"{name}.dict"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
    return [
        f"-dict={words}",
        f"-artifact_prefix={CORPUS}/{name}-",
        f"-max_total_time={seconds}",
        f"-max_len={INPUT_BYTES}",
        f"-timeout={INPUT_S}",
        f"-rss_limit_mb={MEMORY_MB}",
        "-print_final_stats=1",
        str(corpus),
    ]


def _mutate(words: tuple[str, ...], data: bytes, most: int, seed: int) -> bytes:
    """Change bytes, as libFuzzer does, or whole tokens, so that JSON and TOML often stay what they are."""
    chance = random.Random(seed)
    if not words or chance.random() < 0.3:
        return bytes(atheris.Mutate(data, most))
    tokens = re.findall(rb'"(?:[^"\\]|\\.)*"|[\w.+-]+|\s+|.', data, re.DOTALL) or [b"{}"]
    for _ in range(chance.randint(1, 4)):
        at, other = chance.randrange(len(tokens)), chance.randrange(len(tokens))
        match chance.randrange(5):
            case 0:
                tokens[at] = chance.choice(words).encode()
            case 1:
                tokens[at] = tokens[other]
            case 2:
                tokens[at : at + 1] = []
            case 3:
                tokens[at:at] = tokens[other : other + chance.randint(1, 8)]
            case _:
                tokens[at] = b'"%b"' % chance.choice(words).encode()
        tokens = tokens or [b"{}"]
    return b"".join(tokens)[:most]


def _timed(run: Callable[[bytes], None], data: bytes) -> None:
    """Run a target on one input, and fail if that took too much processor time."""
    began = time.process_time()
    run(data)
    took = time.process_time() - began
    assert took < INPUT_CPU_S, f"{took:.1f} s of processor time, at most {INPUT_CPU_S:.0f} are allowed"


def _escaped(word: str) -> str:
    return word.replace("\\u", "\\\\u").replace('"', '\\"')


if __name__ == "__main__":
    if ONE in os.environ:
        target = TARGETS[os.environ[ONE]]
        atheris.Setup(sys.argv, partial(_timed, target.run), custom_mutator=partial(_mutate, target.words))
        atheris.Fuzz()
    main()
