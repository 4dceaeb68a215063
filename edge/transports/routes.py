"""What a transport needs of the routes, which run in the service above it."""

from __future__ import annotations

from typing import Protocol


class Routes(Protocol):
    """Takes readings. Any thread may call its methods, and none of them waits."""

    @property
    def answering(self) -> tuple[str, ...]:
        """Names of the routes that ask the model."""

    @property
    def filters(self) -> tuple[str, ...]:
        """The topic filters to subscribe to; no two of them overlap."""

    def listen(self, on: bool) -> None:
        """Note whether readings can arrive; while they can't, no sensor counts as silent."""

    def reading(self, topic: str, payload: bytes) -> None:
        """Take one message of a sensor."""
