"""With any damage to a file of the cache directory, the bundle loads and its answers do not change."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from edge.board import Board
from edge.config import load
from edge.generation.generator import Delta, Generator
from edge.protocol.messages import Request
from edge.service.bundle_keeper import BundleKeeper
from tests.support import bundles
from tests.support.checkpoint_files import real_model

BLOCKS = 400  # more than the packed weights of the real model have
SYSTEM = "You watch the pumps of a waterworks and explain their readings to the person on duty. " * 5
QUESTIONS = ("Pump 7: 9.4 bar. Why?", "Pump 2: 0.1 bar. What now?")
"""Two with the same start, which is stored as a prefix snapshot."""


def flip(content: bytes, source: random.Random) -> bytes:
    changed = bytearray(content)
    changed[source.randrange(len(changed))] ^= 1 << source.randrange(8)
    return bytes(changed)


def scramble(content: bytes, source: random.Random) -> bytes:
    start = source.randrange(len(content))
    return content[:start] + source.randbytes(min(4096, len(content) - start)) + content[start + 4096 :]


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": flip,
    "scramble": scramble,
    "truncate": lambda content, source: content[: source.randrange(len(content))],
    "zero": lambda content, _: bytes(len(content)),
    "extend": lambda content, source: content + source.randbytes(8),
    "not UTF-8": lambda _content, _: b"\xff\xfe\x80",
    "empty": lambda _content, _: b"",
}


def damage(path: Path, source: random.Random) -> str:
    """Damage a file at random, preserving its modification time or not; returns a description."""
    how = source.choice([*DAMAGES, "fifo", "endless"])
    status = path.stat()
    if how in DAMAGES:
        with path.open("r+b") as file:
            changed = DAMAGES[how](file.read(), source)
            file.seek(0)
            file.write(changed)
            file.truncate()
        if source.random() < 0.7:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        path.unlink()
        os.mkfifo(path) if how == "fifo" else path.symlink_to("/dev/zero")
    return f"{how} of {path.name}"


def answers(config: Path) -> list[str]:
    """Load the bundle as a daemon does, check its weights as it does while idle, and ask it."""
    keeper = BundleKeeper(load(config), Board(), force=True)
    generator = keeper.open()
    while not all(generator.decoder.check_weights() for _ in range(BLOCKS)):
        generator.decoder.discard_cache()
        generator.close()
        generator = keeper.open()
    texts = [text(generator, SYSTEM + question) for question in QUESTIONS]
    generator.close()
    return texts


def text(generator: Generator, prompt: str) -> str:
    request = Request("1", prompt=prompt, max_tokens=12, temperature=0)
    items = generator.generate(request, lambda: None)
    return "".join(item.text for item in items if isinstance(item, Delta))


def config_of(tmp_path: Path, bundle: Path) -> Path:
    config = tmp_path / "edge.toml"
    config.write_text(
        f'bundle = "{bundle}"\ncache_directory = "cache"\nthreads = 1\nstate_directory = "state"\n'
        '[[serial]]\nport = "/dev/nothing"\n'
    )
    return config


def rounds(config: Path, number: int) -> None:
    source = random.Random(number)
    expected = answers(config)
    cache = config.parent / "cache"
    kinds = {path.suffix for path in cache.rglob("*") if path.is_file()}
    assert kinds >= {".stamp", ".xnnpack", ".verified", ".tested", ".vocabulary"}
    for _ in range(number):
        files = sorted(path for path in cache.rglob("*") if path.is_file())
        done = damage(source.choice(files), source)
        assert answers(config) == expected, done


def test_any_damage_to_the_cache_is_detected_and_repaired(tmp_path: Path) -> None:
    rounds(config_of(tmp_path, bundles.small_bundle("gemma3-one-kv-head", "int8", context=512)), 60)


@pytest.mark.slow
def test_any_damage_to_the_cache_of_a_real_model_is_detected_and_repaired(tmp_path: Path) -> None:
    rounds(config_of(tmp_path, bundles.bundle_directory(real_model(), "int4", 512)), 50)
