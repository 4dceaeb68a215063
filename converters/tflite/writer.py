"""Writes a TFLite file whose weights follow the flatbuffer, one weight at a time.

Layout: the flatbuffer (identifier TFL3), then each region at a multiple of 64 bytes. Only the
flatbuffer and the current weight are in memory, so the file can be of any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converters.tflite.graph import Model

ALIGNMENT = 64


def file_size(model: Model, channels: Mapping[str, int]) -> int:
    """Bytes of the file that a `ModelWriter` of these will write, slightly overestimated."""
    regions = [region.size for region in model.regions]
    return _flatbuffer_size(model, channels) + sum(regions) + ALIGNMENT * len(regions)


def _flatbuffer_size(model: Model, channels: Mapping[str, int]) -> int:
    scales = {key: np.ones(count, np.float32) for key, count in channels.items()}
    return len(model.pack({region.name: 1 for region in model.regions}, scales))


class ModelWriter:
    """Lays out `model` at `path`; `write` takes the bytes of regions in any order, `finish` ends the file.

    `channels` gives the number of per-channel scales under each scales key.
    """

    def __init__(self, path: Path, model: Model, channels: Mapping[str, int]) -> None:
        self._model = model
        self._scales = {key: np.ones(count, np.float32) for key, count in channels.items()}
        self._sizes = {region.name: region.size for region in model.regions}
        self._header = _flatbuffer_size(model, channels)
        self.offsets = self._layout()
        self._left = dict(self._sizes)
        self._file = path.open("wb")

    def _layout(self) -> dict[str, int]:
        offsets, at = {}, self._header
        for name, size in self._sizes.items():
            at += -at % ALIGNMENT
            offsets[name] = at
            at += size
        self.total = at
        return offsets

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Append `data` to what is already written of region `name`."""
        raw = memoryview(data)
        done = self._sizes[name] - self._left[name]
        if len(raw) > self._left[name]:
            raise ValueError(f"region {name} has {self._sizes[name]} bytes, {done + len(raw)} were given")
        self._file.seek(self.offsets[name] + done)
        self._file.write(raw)
        self._left[name] -= len(raw)

    def scales(self, key: str, start: int, values: NDArray[np.float32]) -> None:
        """Set the per-channel scales from channel `start` on."""
        self._scales[key][start : start + len(values)] = values

    def finish(self) -> None:
        """Write the flatbuffer in front of the weights.

        Raises ValueError if a region is not fully written.
        """
        missing = [name for name, left in self._left.items() if left]
        if missing:
            raise ValueError(f"regions not fully written: {', '.join(missing)}")
        self._flatbuffer = self._model.pack(self.offsets, self._scales)
        if len(self._flatbuffer) != self._header:
            raise ValueError(f"flatbuffer length changed from {self._header} to {len(self._flatbuffer)}")
        self._file.seek(0)
        self._file.write(self._flatbuffer)

    def scales_offset(self, key: str) -> int:
        """The position of the per-channel scales of `key`, float32, in the finished file."""
        return self._flatbuffer.index(self._scales[key].tobytes())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
