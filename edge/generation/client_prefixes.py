"""What each client may be told of the prefix cache: only tokens that it has sent or received itself.

The KV cache and the prefix cache serve all clients, so the plain number of cached tokens would tell a client
whether another one has asked about the same text. A client's last prompt and answer are kept to bound that
number; clients beyond MAX_BYTES, the least recent first, are told of fewer cached tokens than there are.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

MAX_BYTES = 512 * 1024  # of all clients together


class ClientPrefixes:
    """The last prompt and answer of each client, as token ids."""

    def __init__(self) -> None:
        self._last: OrderedDict[str, array[int]] = OrderedDict()
        self._bytes = 0

    def known(self, client: str, prompt: Sequence[int]) -> int:
        """Return how many of the prompt's first tokens the client's last request and answer had too."""
        last = self._last.get(client, ())
        return next(
            (i for i, (a, b) in enumerate(zip(prompt, last, strict=False)) if a != b),
            min(len(prompt), len(last)),
        )

    def remember(self, client: str, tokens: Sequence[int]) -> None:
        """Keep a client's last prompt and answer in the place of the one before."""
        self._forget(client)
        self._last[client] = array("i", tokens)
        self._bytes += _size(client, self._last[client])
        while self._bytes > MAX_BYTES:
            self._forget(next(iter(self._last)))

    def _forget(self, client: str) -> None:
        tokens = self._last.pop(client, None)
        if tokens is not None:
            self._bytes -= _size(client, tokens)


def _size(client: str, tokens: array[int]) -> int:
    return len(client) + tokens.itemsize * len(tokens) + 256  # with what Python needs for an entry
