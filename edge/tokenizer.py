"""Text to token ids and back, over SentencePiece.

Promises: `encode` never yields a control id, so nothing a user writes can forge a turn; any Unicode text
survives `decode(encode(text))` unchanged, U+2581 and NUL included; `TextStream` shows only whole characters,
and nothing that may still turn out to belong to a stop string.

The library keeps the vocabulary (about 46 MB for 262,144 pieces); nothing of it is copied into Python.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece

from edge.errors import BundleError, RequestError

SPACE_MARK = "\u2581"
"""How a vocabulary spells a space. In text it is an ordinary character, which no piece can hold."""

_UNKNOWN = "<unk>"
_CHUNK = 4096


class Tokenizer:
    """A SentencePiece BPE vocabulary with byte fallback (Gemma 3 and 4: no dummy prefix, no normalisation).

    `model` is a serialised SentencePiece ModelProto; raises BundleError if it is not one, or has no byte
    pieces. Instances may be shared between threads.
    """

    def __init__(self, model: bytes) -> None:
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.load_from_serialized_proto(model)
        except RuntimeError as error:
            raise BundleError(
                "tokenizer.model: not a SentencePiece model; convert the checkpoint again"
            ) from error
        self.vocabulary_size = int(self._pieces.vocab_size())
        self._space_mark = [self._byte_id(byte) for byte in SPACE_MARK.encode()]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with no begin or end token and never a control id.

        U+2581 becomes its three byte pieces: as a piece of its own it would come back as a space.
        Raises RequestError("bad_request") if the text holds a lone surrogate, which has no UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"lone surrogate \\u{ord(text[error.start]):04x} at character {error.start}"
            raise RequestError("bad_request", f"text: {found}; send valid Unicode") from error
        first, *rest = text.split(SPACE_MARK)
        ids: list[int] = self._pieces.encode(first)
        for part in rest:
            ids += self._space_mark
            ids += self._pieces.encode(part)
        return ids

    def piece_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of `token`, maybe only part of a character; b"" for a control id.

        Raises IndexError if `token` is not in the vocabulary.
        """
        pieces = self._pieces
        return _bytes(pieces.id_to_piece(token), pieces.is_byte(token), pieces.is_control(token))

    def all_piece_bytes(self) -> Iterator[bytes]:
        """Yield `piece_bytes` of every id in turn, several times as fast."""
        pieces = self._pieces
        for start in range(0, self.vocabulary_size, _CHUNK):
            ids = list(range(start, min(start + _CHUNK, self.vocabulary_size)))
            yield from map(_bytes, pieces.id_to_piece(ids), pieces.is_byte(ids), pieces.is_control(ids))

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of `tokens`; control ids vanish, bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.piece_bytes, tokens)).decode(errors="replace")

    def is_control(self, token: int) -> bool:
        """Whether `token` marks structure (turns, tools, begin, end) and has no text."""
        return bool(self._pieces.is_control(token))

    def control_id(self, piece: str) -> int:
        """Find the id of the control piece spelled `piece`, e.g. "<start_of_turn>".

        Raises BundleError if the vocabulary has no such piece, or takes it for text, which users could forge.
        """
        token = int(self._pieces.piece_to_id(piece))
        if not self._pieces.is_control(token) or self._pieces.id_to_piece(token) != piece:
            raise BundleError(
                f"tokenizer.model: no control piece {piece}, which this model's prompts need; "
                "convert the checkpoint again"
            )
        return token

    def _byte_id(self, byte: int) -> int:
        token = int(self._pieces.piece_to_id(f"<0x{byte:02X}>"))
        if not self._pieces.is_byte(token):
            raise BundleError(
                f"tokenizer.model: no byte piece <0x{byte:02X}>; a vocabulary with byte fallback is needed"
            )
        return token


def _bytes(piece: str, is_byte: bool, is_control: bool) -> bytes:
    if is_control or piece == _UNKNOWN:
        return b""
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE_MARK, " ").encode()


class TextStream:
    """Token ids in, text that is safe to show out.

    Characters that are split over several tokens wait for their last byte. Text that could be the start of a
    stop string waits until it is decided. Of several stop strings the one that is complete first wins, of
    those that end together the longest, so the result does not depend on how the text was cut into tokens.

    `stopped` is true once a stop string was met; the string itself is not part of the text. Stop strings must
    not be empty.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._shown: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """Everything that `push` and `finish` have returned."""
        return "".join(self._shown)

    def push(self, token: int) -> str:
        """Take one more token; return the text that can be shown now, often ""."""
        return self._advance(self._decoder.decode(self._tokenizer.piece_bytes(token)), last=False)

    def push_text(self, text: str) -> str:
        """Take text that no token stands for; return what can be shown now."""
        return self._advance(text, last=False)

    def finish(self) -> str:
        """No more tokens: return what was held back. An unfinished character becomes U+FFFD."""
        return self._advance(self._decoder.decode(b"", True), last=True)

    def _advance(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + text
        ends = [(start + len(stop), start) for stop in self._stop if (start := held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            cut = min(ends)[1]
            self._held = ""
        else:
            cut = len(held) if last else len(held) - self._undecided(held)
            self._held = held[cut:]
        shown = held[:cut]
        if shown:
            self._shown.append(shown)
        return shown

    def _undecided(self, held: str) -> int:
        """Length of the longest end of `held` that some stop string starts with."""
        for length in range(min(self._longest - 1, len(held)), 0, -1):
            if any(stop.startswith(held[-length:]) for stop in self._stop):
                return length
        return 0
