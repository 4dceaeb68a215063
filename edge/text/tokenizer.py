"""Text to token ids and back, as SentencePiece does it (BPE with byte fallback), over a mapped vocabulary.

`encode` never returns a control id, so user text can't forge a turn. `decode(encode(text))` returns any
Unicode text unchanged, including U+2581 and NUL. `TextStream` returns only whole characters, and holds back
text that could be the start of a stop string.

The vocabulary is mapped from a file (`edge.text.vocabulary`). Loaded by SentencePiece, its 262,144 pieces
would take 44 MB.
"""

from __future__ import annotations

import codecs
import contextlib
import copy
import mmap
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from pathlib import Path

from edge.errors import BundleError, Interruption, RequestError
from edge.files import open_regular, write_atomically
from edge.text.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE_MARK,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    flatten,
)

_CACHED_WORDS = 4096
_MAX_CACHED_BYTES = 64  # of a word in UTF-8; a cache entry takes at most about 600 bytes
_SPACE = SPACE_MARK.encode()
_POLLED = 1024  # words, or steps within a long word, between two polls of `interrupted`: milliseconds
_Pair = tuple[float, int, int, int, int]


class Tokenizer:
    """A SentencePiece BPE vocabulary with byte fallback (Gemma 3 and 4: no dummy prefix, no normalisation).

    `model` is a serialised SentencePiece ModelProto or its vocabulary. Raises BundleError if it is neither or
    has no byte pieces. Threads can share an instance.
    """

    def __init__(self, model: bytes | Vocabulary) -> None:
        vocabulary = model if isinstance(model, Vocabulary) else Vocabulary(flatten(model))
        self._vocabulary = vocabulary
        self.vocabulary_size = vocabulary.size
        self._bytes = [self._byte_id(byte) for byte in range(256)]
        self._space_mark = [self._bytes[byte] for byte in _SPACE]
        whole = sorted(
            (vocabulary.text(token).decode() for token in vocabulary.of_kind(USER_DEFINED)), key=len
        )
        self._whole = re.compile(f"({'|'.join(map(re.escape, reversed(whole))) or '(?!)'})")
        self._words = re.compile(f"(?<![{re.escape(vocabulary.glue)}{SPACE_MARK}])(?={SPACE_MARK})")
        self._interrupted: Callable[[], str | None] = lambda: None
        self._cached = lru_cache(_CACHED_WORDS)(self._merged)

    def interruptible(self, interrupted: Callable[[], str | None]) -> Tokenizer:
        """Return this tokenizer with an `encode` that polls `interrupted` every few milliseconds.

        `encode` raises Interruption when `interrupted` returns a reason. A word of 250 kB takes seconds.
        """
        other = copy.copy(self)
        other._interrupted = interrupted
        return other

    @classmethod
    def open(cls, path: Path, digest: str, cache_directory: Path) -> Tokenizer:
        """Open the tokenizer of the model in `path`, whose SHA-256 is `digest`.

        The first call writes the flat vocabulary to a file in `cache_directory`; later calls map that file.
        """
        flat = cache_directory / f"{digest[:24]}.vocabulary"
        with contextlib.suppress(OSError, ValueError):
            return cls(_mapped(flat))
        with open_regular(path) as file:
            content = flatten(file.read())
        with contextlib.suppress(OSError):  # on a full or read-only disk, keep it in memory
            cache_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(flat, content)
            return cls(_mapped(flat))
        return cls(Vocabulary(content))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without begin or end tokens and never with a control id.

        U+2581 is encoded as three byte pieces, because a piece with U+2581 decodes to a space.
        Raises RequestError("bad_request") for a lone surrogate, which can't be encoded in UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"lone surrogate \\u{ord(text[error.start]):04x} at character {error.start}"
            raise RequestError("bad_request", f"text: {found}; send valid Unicode") from error
        first, *rest = text.split(SPACE_MARK)
        ids = self._encoded(first)
        for part in rest:
            ids += self._space_mark
            ids += self._encoded(part)
        return ids

    def piece_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of `token`, possibly only part of a character; b"" for a control id.

        Raises IndexError if `token` is not in the vocabulary.
        """
        return _bytes(self._vocabulary.text(token), self._vocabulary.kind(token))

    def all_piece_bytes(self) -> Iterator[bytes]:
        """Yield what `piece_bytes` returns for every id, in order; several times faster than calling it."""
        return (_bytes(text, kind) for text, kind in self._vocabulary.texts())

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of `tokens`. Control ids are left out; invalid UTF-8 becomes U+FFFD."""
        return b"".join(map(self.piece_bytes, tokens)).decode(errors="replace")

    def is_control(self, token: int) -> bool:
        """Return whether `token` marks structure (turns, tools, begin, end) and has no text."""
        return self._vocabulary.kind(token) == CONTROL

    def control_id(self, piece: str) -> int:
        """Find the id of the control piece spelled `piece`, e.g. "<start_of_turn>".

        Raises BundleError if the vocabulary has no such piece, or has it as text, which users could forge.
        """
        token = self._vocabulary.find(piece.encode())
        if token < 0 or not self.is_control(token):
            raise BundleError(
                f"tokenizer.model: no control piece {piece}, which this model's prompts need; "
                "convert the checkpoint again"
            )
        return token

    def _byte_id(self, byte: int) -> int:
        token = self._vocabulary.find(b"<0x%02X>" % byte)
        if token < 0 or self._vocabulary.kind(token) != BYTE:
            raise BundleError(
                f"tokenizer.model: no byte piece <0x{byte:02X}>; a vocabulary with byte fallback is needed"
            )
        return token

    def _encoded(self, text: str) -> list[int]:
        """Encode a text without U+2581: user-defined pieces first, longest match, then words."""
        ids: list[int] = []
        for number, part in enumerate(self._whole.split(text.replace(" ", SPACE_MARK))):
            if number % 2:
                ids.append(self._vocabulary.find(part.encode()))
                continue
            for count, word in enumerate(self._words.split(part)):
                if count % _POLLED == 0:
                    self._poll()
                short = len(word) <= _MAX_CACHED_BYTES and len(word.encode()) <= _MAX_CACHED_BYTES
                ids += self._cached(word) if short else self._merged(word)
        return ids

    def _merged(self, word: str) -> array[int]:
        """Encode a word: merge the adjacent pair whose piece has the highest score until no pair merges.

        Of pairs with the same score, the first is merged. A character without a piece becomes byte pieces.
        """
        symbols = [character.encode() for character in word]
        ids: list[int] = []
        pairs: list[_Pair] = []
        for left, symbol in enumerate(symbols):
            if left % _POLLED == _POLLED - 1:
                self._poll()
            ids.append(self._mergeable(symbol))
            if left + 1 < len(symbols) and (pair := self._pair(symbols, left, left + 1)):
                pairs.append(pair)
        before, after = list(range(-1, len(symbols) - 1)), list(range(1, len(symbols) + 1))
        heapify(pairs)
        steps = 0
        while pairs:
            steps += 1
            if steps % _POLLED == 0:
                self._poll()
            _, left, right, size, token = heappop(pairs)
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != size:
                continue
            symbols[left] += symbols[right]
            symbols[right], ids[left] = b"", token
            following = after[left] = after[right]
            if following < len(symbols):
                before[following] = left
                if pair := self._pair(symbols, left, following):
                    heappush(pairs, pair)
            if before[left] >= 0 and (pair := self._pair(symbols, before[left], left)):
                heappush(pairs, pair)
        merged = array("i")
        for symbol, token in zip(symbols, ids, strict=True):
            if symbol:
                merged.extend([token] if token >= 0 else [self._bytes[byte] for byte in symbol])
        return merged

    def _poll(self) -> None:
        reason = self._interrupted()
        if reason is not None:
            raise Interruption(reason)

    def _pair(self, symbols: list[bytes], left: int, right: int) -> _Pair | None:
        """Queue entry for the piece that two adjacent symbols merge into; None if there is none."""
        text = symbols[left] + symbols[right]
        token = self._mergeable(text)
        return (-self._vocabulary.score(token), left, right, len(text), token) if token >= 0 else None

    def _mergeable(self, text: bytes) -> int:
        """Return the id of the piece `text` if a merge can produce it, else -1."""
        token = self._vocabulary.find(text)
        return token if token >= 0 and self._vocabulary.kind(token) in (NORMAL, USER_DEFINED) else -1


def _mapped(path: Path) -> Vocabulary:
    with open_regular(path) as file:
        return Vocabulary(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _bytes(text: bytes, kind: int) -> bytes:
    if kind in (CONTROL, UNKNOWN):
        return b""
    return bytes([int(text[3:5], 16)]) if kind == BYTE else text.replace(_SPACE, b" ")


class TextStream:
    """Turns token ids into text that is safe to show.

    A character that is split over several tokens is held back until its last byte arrives. Text that could
    be the start of a stop string is held back until that is decided. The stop string that ends first wins; of
    those that end at the same character, the longest. The result does not depend on the tokenization.

    `stopped` is true once a stop string was found. The stop string is not part of the text. Stop strings must
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
        """All text returned so far."""
        return "".join(self._shown)

    def push(self, token: int) -> str:
        """Add a token; return the text that can be shown now, often ""."""
        return self._advance(self._decoder.decode(self._tokenizer.piece_bytes(token)), last=False)

    def push_text(self, text: str) -> str:
        """Add text that does not come from a token; return the text that can be shown now."""
        return self._advance(text, last=False)

    def finish(self) -> str:
        """End the stream; return the text held back. An incomplete character becomes U+FFFD."""
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
        """Length of the longest suffix of `held` that is a prefix of a stop string."""
        for length in range(min(self._longest - 1, len(held)), 0, -1):
            if any(stop.startswith(held[-length:]) for stop in self._stop):
                return length
        return 0
