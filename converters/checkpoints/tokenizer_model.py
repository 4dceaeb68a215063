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

from converters.checkpoints.text_files import read_bytes, read_json
from edge.errors import CheckpointError
from edge.text.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE_MARK,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    wire_fields,
)

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
_RUN = re.compile(rf"\n+|\t+|{SPACE_MARK}{{2,}}")
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
        Piece(text.replace(" ", SPACE_MARK), float(score), int(type_))
        for text, score, type_ in zip(tokens, scores, types, strict=True)
    )
    return _model(pieces, source, vocabulary)


def from_tokenizer_json(path: Path, vocabulary: int) -> bytes:
    """The model of a tokenizer.json (BPE with byte fallback, space to U+2581), cut to `vocabulary` pieces.

    Raises CheckpointError if it is of another kind or its merges are not in the order of their results' ids.
    """
    data = read_json(path)
    try:
        model, normalizer = data["model"], data["normalizer"]
        usual = model["type"] == "BPE" and model["byte_fallback"] is True
        if not usual or (normalizer["pattern"], normalizer["content"]) != ({"String": " "}, SPACE_MARK):
            raise CheckpointError(
                f"{path}: not a tokenizer of Gemma's kind (BPE, byte fallback, space to U+2581)"
            )
        ids: dict[str, int] = dict(model["vocab"])
        kinds: dict[str, int] = {}
        for token in data["added_tokens"]:
            ids[token["content"]] = int(token["id"])
            kinds[token["content"]] = CONTROL if token["special"] else USER_DEFINED
        _require_merges_by_id(path, ids, model["merges"])
        texts = {id_: text for text, id_ in ids.items()}
        rows = range(min(vocabulary, max(texts) + 1))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not a usable tokenizer.json ({error!r:.80}); fetch it again"
        ) from error
    hole = "<unused_row{}>".format
    kinds |= {hole(id_): CONTROL for id_ in rows if id_ not in texts}
    names = (texts.get(id_, hole(id_)) for id_ in rows)
    pieces = (Piece(name, -float(id_), kinds.get(name, NORMAL)) for id_, name in enumerate(names))
    return _model(pieces, path, vocabulary)


def _require_merges_by_id(path: Path, ids: Mapping[str, int], merges: Iterable[Any]) -> None:
    """Raise CheckpointError unless merges, but for those of runs, come in the order of their results' ids.

    Then the id of a piece is its priority, and SentencePiece merges as the list says.
    """
    last = -1
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        result = ids[left + right]
        if _RUN.fullmatch(left + right):
            continue
        if result < last:
            raise CheckpointError(f"{path}: its merges are not in the order of their ids, as Gemma's are")
        last = result


def piece_count(path: Path) -> int:
    """How many pieces a tokenizer.model has; raises CheckpointError if it is damaged."""
    try:
        return sum(number == 1 for number, _ in wire_fields(read_bytes(path)))
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model; fetch it again") from error


def from_sentencepiece(path: Path, vocabulary: int) -> bytes:
    """The model in a tokenizer.model, cut to `vocabulary` pieces, its special tokens made CONTROL.

    Raises CheckpointError if it is damaged or not of Gemma's kind (BPE, byte fallback, text as it is).
    """
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in wire_fields(read_bytes(path)):
            if number == 1:
                fields = dict(wire_fields(value))
                score = struct.unpack("<f", fields.get(2, bytes(4)))[0]
                pieces.append(Piece(fields[1].decode("utf-8"), score, fields.get(3, NORMAL)))
            elif number in (2, 3):
                (trainer if number == 2 else normalizer).update(wire_fields(value))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model; fetch it again") from error
    bpe = trainer.get(3, 1) == 2 and trainer.get(35, 0) == 1
    as_is = not normalizer.get(2) and (normalizer.get(3, 1), normalizer.get(4, 1), normalizer.get(5, 1)) == (
        0,
        0,
        1,
    )
    if not (bpe and as_is):
        raise CheckpointError(f"{path}: not a tokenizer of Gemma's kind (BPE, byte fallback, text as it is)")
    return _model(pieces, path, vocabulary)


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
