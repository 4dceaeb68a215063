"""The text that calibration runs over, as sequences of token ids."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

from converters.checkpoints.base import Checkpoint
from edge.errors import EdgeError
from edge.text.tokenizer import Tokenizer

SEQUENCE = 512
"""Tokens of a sequence, `<bos>` included."""

_FEWEST = 4
_MOST = 16

_MOST_CHARACTERS = 1 << 20
"""Longer texts are not encoded whole: a log of 100 MB would take ten minutes, for 8,176 tokens."""


@dataclass(frozen=True)
class CalibrationText:
    """A text and its name in messages and in the manifest."""

    name: str
    content: str

    @classmethod
    def built_in(cls) -> CalibrationText:
        """The default text: sensor requests with their answers, and general prose.

        It was written for this project and shares nothing with the text that `evaluate` uses.
        """
        path = resources.files("converters").joinpath("data/calibration_text.txt")
        return cls("built-in text", path.read_text("utf-8"))

    def digest(self) -> str:
        """SHA-256 (hex) of the text."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    def sequences(self, checkpoint: Checkpoint) -> list[list[int]]:
        """Sequences of 512 ids that start with `<bos>`; 16 of a long text, evenly spread.

        Raises EdgeError if there are fewer than 4.
        """
        ids, step = Tokenizer(checkpoint.tokenizer_model).encode(self._evenly_spread()), SEQUENCE - 1
        whole = len(ids) // step
        if whole < _FEWEST:
            raise EdgeError(
                f"{self.name}: has {len(ids)} tokens, calibration needs at least {_FEWEST * step};"
                " give a longer text, or --calibrate without a file for the built-in one"
            )
        chosen = min(whole, _MOST)
        starts = (index * whole // chosen * step for index in range(chosen))
        return [[checkpoint.chat.bos_id, *ids[start : start + step]] for start in starts]

    def _evenly_spread(self) -> str:
        """The text, or 16 parts of a very long one."""
        size, part = len(self.content), _MOST_CHARACTERS // _MOST
        if size <= _MOST_CHARACTERS:
            return self.content
        starts = (index * size // _MOST for index in range(_MOST))
        return "".join(self.content[start : start + part] for start in starts)
