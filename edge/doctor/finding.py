"""The outcome of one of the doctor's checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "problem", "unknown"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check; `fix` is a command or an instruction, None if there is nothing to do."""

    check: str
    state: State
    message: str
    fix: str | None = None
