"""Where quantised rows lie in a bundle.

The token embedding is read from the output head's own bytes in `decoder.tflite`, or from a file of its own
where the head is another matrix; Gemma 4's per-layer table always has a file of its own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowTable:
    """Where a table of `rows` x `columns` values lies in `file` of the bundle.

    `codes` and `scales` are byte offsets. `bits` is 32 (float32, no scales), 8, 4 or 2 (low bits first).
    Each row has `groups` scales of `scale_type` (float32 or float16), for equal runs of columns.
    """

    file: str
    rows: int
    columns: int
    bits: int
    codes: int
    scales: int
    groups: int
    scale_type: str
