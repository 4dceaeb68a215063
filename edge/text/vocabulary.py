"""A tokenizer's vocabulary in a flat layout that can be mapped from a file.

`flatten` builds it from a SentencePiece model; this takes a second and is done once. `Vocabulary` looks up
pieces by id or by text. Mapped file pages are not anonymous memory; loaded by SentencePiece, the same
vocabulary takes 44 MB of it.

Layout, little-endian: a header with a CRC-32 of everything after it; the start of each piece's text and the
end of the last; scores; ids ordered by the hash of their text; the start of each hash's ids and the end of
the last; types; the glue (see `Vocabulary`); all texts, concatenated.

Wire format of the model: https://protobuf.dev/programming-guides/encoding/; field numbers:
sentencepiece_model.proto of https://github.com/google/sentencepiece.
"""

from __future__ import annotations

import itertools
import mmap
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from typing import Any

from edge.errors import BundleError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

SPACE_MARK = "\u2581"
"""A space, as pieces spell it. No piece can represent this character itself."""

_MAGIC = b"EDGEVOC2"
_HEADER = struct.Struct("<8s5I")  # magic, CRC-32, pieces, hashes, bytes of the glue, bytes of all texts
_CHECKED_FROM = 12  # the first byte after the CRC-32
_PIECE_TAIL = struct.Struct("<BfBB")  # score (field 2, float), type (field 3, varint)
_BPE = 2


def flatten(model: bytes) -> bytes:
    """Lay out the vocabulary of a serialised ModelProto (BPE with byte fallback).

    Raises BundleError if it is not one.
    """
    import numpy as np  # imported only here: a process that only reads a vocabulary saves 8 MB

    try:
        pieces, trainer = _read(model)
    except (ValueError, TypeError, KeyError, IndexError, struct.error):
        pieces, trainer = [], {}
    if not pieces or trainer.get(3) != _BPE or trainer.get(35) != 1:
        raise BundleError(
            "tokenizer.model: not a SentencePiece BPE model with byte fallback; convert the checkpoint again"
        )
    texts, scores, types = zip(*pieces, strict=True)
    count = len(texts)
    hashes = 1 << max(8, (count - 1).bit_length())
    hashed = np.fromiter(map(zlib.crc32, texts), np.uint32, count) & np.uint32(hashes - 1)
    by_hash = np.argsort(hashed, kind="stable")
    glue = _glue(texts)
    parts: list[Any] = [
        np.cumsum([0, *map(len, texts)]),
        np.asarray(scores, "<f4"),
        by_hash,
        np.searchsorted(hashed[by_hash], np.arange(hashes + 1)),
    ]
    arrays = [part if part.dtype == np.float32 else part.astype("<u4") for part in parts]
    blob = b"".join(texts)
    header = _HEADER.pack(_MAGIC, 0, count, hashes, len(glue), len(blob))
    flat = bytearray().join([header, *(array.tobytes() for array in arrays), bytes(types), glue, blob])
    struct.pack_into("<I", flat, _CHECKED_FROM - 4, zlib.crc32(memoryview(flat)[_CHECKED_FROM:]))
    return bytes(flat)


def wire_fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value (int for a varint, else bytes) of each field. ValueError if truncated."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(raw, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind, 0)
        if kind == 2:
            size, at = _varint(raw, at)
        elif not size:
            raise ValueError(f"wire type {kind}")
        if at + size > len(raw):
            raise ValueError("cut short")
        yield key >> 3, raw[at : at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """The varint at `at` and the offset after it. IndexError if it is truncated."""
    value = shift = 0
    while raw[at] & 0x80:
        value |= (raw[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | raw[at] << shift, at + 1


def _read(model: bytes) -> tuple[list[tuple[bytes, float, int]], dict[int, Any]]:
    """Text, score and type of every piece, and the fields of the trainer spec."""
    pieces: list[tuple[bytes, float, int]] = []
    trainer: dict[int, Any] = {}
    for number, value in wire_fields(model):
        if number == 1:
            pieces.append(_piece(value))
        elif number == 2:
            trainer.update(wire_fields(value))
    return pieces, trainer


def _piece(raw: bytes) -> tuple[bytes, float, int]:
    end = 2 + raw[1]
    if raw[0] == 0x0A and end == len(raw) - _PIECE_TAIL.size < 0x80:  # the usual encoding
        score_key, score, type_key, kind = _PIECE_TAIL.unpack_from(raw, end)
        if (score_key, type_key) == (0x15, 0x18):
            return raw[2:end], score, kind
    fields = dict(wire_fields(raw))
    return fields[1], struct.unpack("<f", fields.get(2, bytes(4)))[0], fields.get(3, NORMAL)


def _glue(texts: tuple[bytes, ...]) -> bytes:
    """The characters that come before a space inside some piece, as UTF-8."""
    mark = SPACE_MARK.encode()
    inside = (text.decode() for text in texts if text.rfind(mark) > 0)
    return "".join(
        sorted({a for text in inside for a, b in itertools.pairwise(text) if b == SPACE_MARK})
    ).encode()


class Vocabulary:
    """Pieces by id and by text. `flat` is the result of `flatten`, or a file of it, mapped.

    `size` is the number of pieces. `glue` has the characters that come before a space inside some piece.
    After any other character, a text can be split before a space and its parts encoded separately.
    """

    def __init__(self, flat: bytes | mmap.mmap) -> None:
        """Raises ValueError if `flat` is not a vocabulary, is truncated or has a damaged byte."""
        if len(flat) < _HEADER.size or sys.byteorder != "little":
            raise ValueError("not a vocabulary")
        self.size: int
        magic, checksum, self.size, hashes, glue, texts = _HEADER.unpack_from(flat)
        sizes = (4 * (self.size + 1), 4 * self.size, 4 * self.size, 4 * (hashes + 1), self.size, glue, texts)
        ends = [_HEADER.size + sum(sizes[:i]) for i in range(len(sizes) + 1)]
        view = memoryview(flat)
        if magic != _MAGIC or ends[-1] != len(flat) or zlib.crc32(view[_CHECKED_FROM:]) != checksum:
            raise ValueError("not a vocabulary")
        parts = [view[start:end] for start, end in itertools.pairwise(ends)]
        self._flat, self._texts_at = flat, ends[-2]
        self._starts, self._by_hash, self._buckets = (parts[i].cast("I") for i in (0, 2, 3))
        self._scores, self._types = parts[1].cast("f"), parts[4]
        self._hash_mask = hashes - 1
        self.glue = bytes(parts[5]).decode()

    def text(self, token: int) -> bytes:
        """The text of piece `token`, as the vocabulary spells it. Raises IndexError for an unknown id."""
        if token < 0:
            raise IndexError(token)
        at = self._texts_at
        return self._flat[at + self._starts[token] : at + self._starts[token + 1]]

    def kind(self, token: int) -> int:
        """Type of a piece."""
        return self._types[token]

    def score(self, token: int) -> float:
        """Score of a piece: the merge whose piece has the highest score is done first."""
        return self._scores[token]

    def find(self, text: bytes) -> int:
        """Return the id of the piece `text`, of any type; -1 if there is none."""
        bucket = zlib.crc32(text) & self._hash_mask
        flat, starts, at = self._flat, self._starts, self._texts_at
        for place in range(self._buckets[bucket], self._buckets[bucket + 1]):
            token = self._by_hash[place]
            if flat[at + starts[token] : at + starts[token + 1]] == text:
                return token
        return -1

    def of_kind(self, kind: int) -> list[int]:
        """Ids of all pieces of a type."""
        return [found.start() for found in re.finditer(re.escape(bytes([kind])), self._types)]

    def texts(self) -> Iterator[tuple[bytes, int]]:
        """Yield text and type of every piece, in order of ids."""
        starts, blob = self._starts.tolist(), self._flat[self._texts_at :]
        for start, end, kind in zip(starts, starts[1:], self._types, strict=False):
            yield blob[start:end], kind
