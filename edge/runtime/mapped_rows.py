"""Rows of a `RowTable` from the mapped file, dequantised when they are read.

Only the pages of these rows are touched; nothing becomes anonymous memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.bundles.row_table import RowTable
from edge.files import open_regular

_ROW_TYPES: dict[int, type[np.generic]] = {32: np.float32, 8: np.int8, 4: np.uint8, 2: np.uint8}


class MappedRows:
    """An open `RowTable`."""

    def __init__(self, directory: Path, table: RowTable) -> None:
        with open_regular(directory / table.file) as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)
        width = table.columns * table.bits // 8
        raw = np.frombuffer(mapped, np.uint8, table.rows * width, table.codes)
        self._codes = raw.view(_ROW_TYPES[table.bits]).reshape(table.rows, -1)
        self._table = table
        if table.bits < 32:
            count = table.rows * table.groups
            scales = np.frombuffer(mapped, np.dtype(table.scale_type), count, table.scales)
            self._scales = scales.reshape(table.rows, table.groups)

    def rows(self, ids: Sequence[int] | NDArray[np.int32]) -> NDArray[np.float32]:
        """The rows `ids` as float32 [len(ids), columns]."""
        table, stored = self._table, self._codes[np.asarray(ids, np.intp)]
        if table.bits == 32:
            return stored
        codes = stored if table.bits == 8 else unpack_codes(stored, table.bits)
        grouped = codes.reshape(len(ids), table.groups, -1).astype(np.float32)
        grouped *= self._scales[np.asarray(ids, np.intp), :, None]
        return grouped.reshape(len(ids), table.columns)


def unpack_codes(packed: NDArray[Any], bits: int) -> NDArray[np.int8]:
    """Signed codes [n, columns] from bytes [n, columns * bits / 8], lowest bits first, two's complement."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    spread = (packed[..., None] >> shifts).astype(np.uint8)
    signed = (spread << np.uint8(8 - bits)).view(np.int8) >> np.int8(8 - bits)
    return signed.reshape(packed.shape[0], -1)
