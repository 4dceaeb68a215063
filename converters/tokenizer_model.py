"""A SentencePiece model (a serialised ModelProto) from whatever vocabulary a Gemma checkpoint carries.

Whatever the source, the result encodes plain text only: every special token is a CONTROL piece, which text
can never produce, so a prompt can't forge a turn. Runs of newlines, spaces and tabs are user-defined pieces
(longest match first), the other pieces merge in the order of their scores (BPE), and characters without a
piece become bytes. Same input, same bytes.

Wire format: https://protobuf.dev/programming-guides/encoding/; field numbers: sentencepiece_model.proto of
https://github.com/google/sentencepiece.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from edge.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_SPACE = "\u2581"
_UNKNOWN_PIECE = "<unk>"
# fmt: off
_SPECIAL_PIECES = frozenset((  # of Gemma 3 and Gemma 4
    "<pad>", "<eos>", "<bos>", "<mask>", "[multimodal]", "<start_of_turn>", "<end_of_turn>",
    "<start_of_image>", "<end_of_image>", "<image_soft_token>", "<|tool>", "<tool|>", "<|tool_call>",
    "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>', "<|think|>", "<|channel>",
    "<channel|>", "<|turn>", "<turn|>", "<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>",
    "<audio|>", "<|video|>",
))
# fmt: on
_UNUSED_PIECE = re.compile(r"<unused\d+>")
_RUN = re.compile(rf"\n+|\t+|{_SPACE}{{2,}}")
_BYTES = [bytes([value]) for value in range(128)]
_PIECE_TAIL = struct.Struct("<BfBB")  # score (field 2, float), type (field 3, varint)
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class Piece(NamedTuple):
    """One entry of the vocabulary; its id is its place. A higher score merges first."""

    text: str
    score: float
    kind: int


def from_gguf(metadata: Mapping[str, Any], source: Path, vocabulary: int) -> bytes:
    """The model of a GGUF file's vocabulary, cut to `vocabulary` pieces.

    `tokenizer.ggml.model` "llama" has scores; "gemma4" has ids in the order of their merges.
    Raises CheckpointError for another kind or a vocabulary that is incomplete.
    """
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type")
    if kind not in ("llama", "gemma4"):
        raise CheckpointError(
            f"{source}: tokenizer {kind!r:.60} is not supported; Gemma's are llama and gemma4"
        )
    if not isinstance(tokens, list) or types is None or len(types) != len(tokens):
        raise CheckpointError(
            f"{source}: tokenizer.ggml.tokens and token_type are missing or of unequal length"
        )
    scores: Any = range(0, -len(tokens), -1)
    if kind == "llama":
        scores = metadata.get("tokenizer.ggml.scores")
        if scores is None or len(scores) != len(tokens):
            raise CheckpointError(
                f"{source}: tokenizer.ggml.scores is missing or of another length than tokens"
            )
    pieces = (
        Piece(text.replace(" ", _SPACE), float(score), int(type_))
        for text, score, type_ in zip(tokens, scores, types, strict=True)
    )
    return _model(pieces, source, vocabulary)


def _model(pieces: Iterable[Piece], source: Path, vocabulary: int) -> bytes:
    """The serialised model of the first `vocabulary` of `pieces`, after `_canonical`; fewer are filled up."""
    chosen = [_canonical(piece) for _, piece in zip(range(vocabulary), pieces, strict=False)]
    chosen += [Piece(f"<unused_row{index}>", 0.0, CONTROL) for index in range(len(chosen), vocabulary)]
    if sum(piece.kind == UNKNOWN for piece in chosen) != 1:
        raise CheckpointError(
            f"{source}: the vocabulary lacks {_UNKNOWN_PIECE} within its first {vocabulary} pieces"
        )
    if sum(piece.kind == BYTE for piece in chosen) != 256:
        raise CheckpointError(
            f"{source}: the vocabulary lacks byte pieces within its first {vocabulary} pieces"
        )
    if len({piece.text for piece in chosen}) != len(chosen):
        raise CheckpointError(f"{source}: the vocabulary has the same piece twice")
    return _serialised(chosen)


def _canonical(piece: Piece) -> Piece:
    """The piece with the type that it must have, whatever its source calls it."""
    if piece.text == _UNKNOWN_PIECE:
        return piece._replace(kind=UNKNOWN, score=0.0)
    if _BYTE_PIECE.fullmatch(piece.text):
        return piece._replace(kind=BYTE, score=0.0)
    special = piece.text in _SPECIAL_PIECES or _UNUSED_PIECE.fullmatch(piece.text)
    if special or piece.kind in (CONTROL, UNKNOWN, UNUSED, BYTE):
        return piece._replace(kind=CONTROL, score=0.0)
    if piece.kind == USER_DEFINED or _RUN.fullmatch(piece.text):
        return piece._replace(kind=USER_DEFINED, score=0.0)
    return piece._replace(kind=NORMAL)


def _serialised(pieces: list[Piece]) -> bytes:
    """The ModelProto: pieces, trainer_spec and normalizer_spec."""
    out = bytearray()
    for piece in pieces:
        tail = _PIECE_TAIL.pack(0x15, piece.score, 0x18, piece.kind)
        out += _field(1, _field(1, piece.text.encode()) + tail)
    ids = {piece.text: index for index, piece in enumerate(pieces)}
    trainer = _number(3, 2) + _number(4, len(pieces)) + _number(35, 1)  # BPE, vocab_size, byte_fallback
    for id_field, name_field, text in (
        (40, 45, "<unk>"),
        (41, 46, "<bos>"),
        (42, 47, "<eos>"),
        (43, 48, "<pad>"),
    ):
        trainer += _number(id_field, ids.get(text, -1)) + _field(name_field, text.encode())
    normalizer = _field(1, b"identity") + _number(3, 0) + _number(4, 0) + _number(5, 1)
    return bytes(out + _field(2, trainer) + _field(3, normalizer))


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value & 0xFFFFFFFFFFFFFFFF)


def _varint(value: int) -> bytes:
    if value < 0x80:
        return _BYTES[value]
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
