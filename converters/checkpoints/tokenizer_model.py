"""A SentencePiece model (a serialised ModelProto) from the vocabulary of any Gemma checkpoint.

The result encodes plain text only: every special token is a CONTROL piece, which text can never produce, so a
prompt can't forge a turn. Runs of newlines, spaces and tabs are user-defined pieces
(longest match first), the other pieces merge in the order of their scores (BPE), and characters without a
piece become bytes. The same input gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto, NormalizerSpec, TrainerSpec

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
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class Piece(NamedTuple):
    """One entry of the vocabulary; its id is its position. A higher score merges first."""

    text: str
    score: float
    type: int


def from_gguf(metadata: Mapping[str, Any], source: Path, vocabulary: int) -> bytes:
    """The model of a GGUF file's vocabulary, cut to `vocabulary` pieces.

    `tokenizer.ggml.model` "llama" has scores; "gemma4" has ids in the order of their merges.
    Raises CheckpointError for another type or an incomplete vocabulary.
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

    Raises CheckpointError if it is of another type or its merges are not in the order of their results' ids.
    """
    data = read_json(path)
    try:
        model, normalizer = data["model"], data["normalizer"]
        usual = model["type"] == "BPE" and model["byte_fallback"] is True
        if not usual or (normalizer["pattern"], normalizer["content"]) != ({"String": " "}, SPACE_MARK):
            raise CheckpointError(f"{path}: not like Gemma's tokenizer (BPE, byte fallback, space to U+2581)")
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
    """Raise CheckpointError unless merges, except those of runs, are in the order of their results' ids.

    The id of a piece is then its priority, and SentencePiece merges in the order of the list.
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
    """The number of pieces in a tokenizer.model; raises CheckpointError if it is damaged."""
    return len(_parsed(path).pieces)


def from_sentencepiece(path: Path, vocabulary: int) -> bytes:
    """The model in a tokenizer.model, cut to `vocabulary` pieces, its special tokens made CONTROL.

    Raises CheckpointError if it is damaged or not like Gemma's (BPE, byte fallback, text unchanged).
    """
    model = _parsed(path)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    unchanged = (
        not normalizer.precompiled_charsmap
        and not normalizer.add_dummy_prefix
        and not normalizer.remove_extra_whitespaces
        and normalizer.escape_whitespaces
    )
    if trainer.model_type != TrainerSpec.BPE or not trainer.byte_fallback or not unchanged:
        raise CheckpointError(f"{path}: not like Gemma's tokenizer (BPE, byte fallback, text unchanged)")
    try:
        pieces = [Piece(piece.piece, piece.score, piece.type) for piece in model.pieces]
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not a SentencePiece model; fetch it again") from error
    return _model(pieces, path, vocabulary)


def _parsed(path: Path) -> ModelProto:
    try:
        return ModelProto.FromString(read_bytes(path))
    except DecodeError as error:
        raise CheckpointError(f"{path}: not a SentencePiece model; fetch it again") from error


def _model(pieces: Iterable[Piece], source: Path, vocabulary: int) -> bytes:
    """The serialised model of the first `vocabulary` pieces, canonical; missing ones are filled in."""
    chosen = [_canonical(piece) for _, piece in zip(range(vocabulary), pieces, strict=False)]
    chosen += [Piece(f"<unused_row{index}>", 0.0, CONTROL) for index in range(len(chosen), vocabulary)]
    if sum(piece.type == UNKNOWN for piece in chosen) != 1:
        raise CheckpointError(
            f"{source}: the vocabulary lacks {_UNKNOWN_PIECE} within its first {vocabulary} pieces"
        )
    if sum(piece.type == BYTE for piece in chosen) != 256:
        raise CheckpointError(
            f"{source}: the vocabulary lacks byte pieces within its first {vocabulary} pieces"
        )
    if len({piece.text for piece in chosen}) != len(chosen):
        raise CheckpointError(f"{source}: the vocabulary has a duplicate piece")
    try:
        return _serialised(chosen)
    except ValueError as error:  # a lone surrogate
        raise CheckpointError(f"{source}: the vocabulary has a piece that is not Unicode text") from error


def _canonical(piece: Piece) -> Piece:
    """The piece with the type that it must have, regardless of its type in the source."""
    if piece.text == _UNKNOWN_PIECE:
        return piece._replace(type=UNKNOWN, score=0.0)
    if _BYTE_PIECE.fullmatch(piece.text):
        return piece._replace(type=BYTE, score=0.0)
    special = piece.text in _SPECIAL_PIECES or _UNUSED_PIECE.fullmatch(piece.text)
    if special or piece.type in (CONTROL, UNKNOWN, UNUSED, BYTE):
        return piece._replace(type=CONTROL, score=0.0)
    if piece.type == USER_DEFINED or _RUN.fullmatch(piece.text):
        return piece._replace(type=USER_DEFINED, score=0.0)
    return piece._replace(type=NORMAL)


def _serialised(pieces: list[Piece]) -> bytes:
    ids = {piece.text: index for index, piece in enumerate(pieces)}
    model = ModelProto(
        trainer_spec=TrainerSpec(
            model_type=TrainerSpec.BPE,
            vocab_size=len(pieces),
            byte_fallback=True,
            unk_id=ids.get("<unk>", -1),
            bos_id=ids.get("<bos>", -1),
            eos_id=ids.get("<eos>", -1),
            pad_id=ids.get("<pad>", -1),
            unk_piece="<unk>",
            bos_piece="<bos>",
            eos_piece="<eos>",
            pad_piece="<pad>",
        ),
        normalizer_spec=NormalizerSpec(
            name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, escape_whitespaces=True
        ),
    )
    for text, score, type_ in pieces:
        model.pieces.add(piece=text, score=score, type=type_)
    return bytes(model.SerializeToString(deterministic=True))
