"""The content of a node's retained health: queue, speed, memory, temperature and problems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge.board import Board
from edge.requests.engine import Engine
from edge.requests.journal import Journal

MIB = 1024 * 1024


def health(engine: Engine, journal: Journal, board: Board) -> Mapping[str, Any]:
    """Gather it. Unknown values are null.

    `tokens_per_s` and `first_token_ms` are those of the latest answer, `memory_mib` is anonymous memory
    (RssAnon), `throttling` lists what holds a Raspberry Pi's processor back now, `journal_damage` counts
    records that the disk has damaged.
    """
    final = engine.last_final
    throttling, temperature = board.throttling, board.temperature_c
    return {
        "queue": engine.waiting,
        "working": engine.working,
        "answered": engine.answered,
        "failed": engine.failed,
        "tokens_per_s": None if final is None else final.tokens_per_s,
        "first_token_ms": None if final is None else round(final.timings.first_token_ms),
        "memory_mib": _anonymous_mib(board),
        "temperature_c": None if temperature is None else round(temperature),
        "throttling": None if throttling is None else list(throttling.now),
        "last_error": engine.last_error,
        "journal": journal.problem,
        "journal_damage": journal.damage,
    }


def _anonymous_mib(board: Board) -> int | None:
    size = board.anonymous_memory("self")
    return None if size is None else round(size / MIB)
