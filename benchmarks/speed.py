"""Prefill and decode speed of a bundle in a separate process, against the limit of memory bandwidth.

    python -m benchmarks.speed BUNDLE [--threads N] [--context N]

Prints one line of JSON. Tokens per second are those of the fastest of several runs (other programs only make
a run slower) and the median. The bound is the measured read bandwidth over the bytes a decode step reads.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np

from edge.bundles.bundle import Bundle
from edge.runtime.decoder import Decoder

PROMPT, ANSWER, RUNS = 512, 128, 5


def read_bandwidth(threads: int, megabytes: int = 512) -> float:
    """Bytes per second that `threads` threads together read from memory (fastest of 5 sums)."""
    parts = [np.ones(megabytes * (1 << 20) // threads // 8, np.int64) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - started))
    return best


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def anonymous_bytes() -> int:
    """This process's anonymous memory (RssAnon), in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def decode_steps(decoder: Decoder, count: int) -> list[float]:
    """Seconds of each of `count` greedy steps, head included."""
    token, times = 2, []
    for _ in range(count):
        started = time.perf_counter()
        decoder.advance([token], lambda: None)
        token = int(decoder.logits().argmax())
        times.append(time.perf_counter() - started)
    return times


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--cache", type=click.Path(path_type=Path), required=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--context", default=2048, show_default=True)
def main(directory: Path, cache: Path, threads: int, context: int) -> None:
    """Measure the bundle in DIRECTORY."""
    started = time.perf_counter()
    bundle = Bundle.open(directory, cache)
    decoder = Decoder(bundle, cache, threads, context)
    loaded = time.perf_counter() - started
    rng = np.random.default_rng(0)
    ids = rng.integers(300, min(200_000, bundle.manifest.architecture.vocabulary), PROMPT).tolist()
    prefills, steps = [], []
    for _ in range(RUNS):
        decoder.rewind(())
        prefills.append(seconds(lambda: decoder.prefill(ids, lambda: None)))
        steps += decode_steps(decoder, ANSWER)
    bandwidth = read_bandwidth(threads)
    bytes_per_token = bundle.manifest.quantization["bytes_per_token"]
    result = {
        "load_s": loaded,
        "prefill_tps": PROMPT / min(prefills),
        "prefill_median_tps": PROMPT / statistics.median(prefills),
        "decode_tps": 1 / sorted(steps)[len(steps) // 10],
        "decode_median_tps": 1 / statistics.median(steps),
        "bytes_per_token": bytes_per_token,
        "bandwidth": bandwidth,
        "bound_tps": bandwidth / bytes_per_token,
        "anonymous_bytes": anonymous_bytes(),
    }
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
