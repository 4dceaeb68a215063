"""What a transport needs of the routes, which run in the service above it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Routes(Protocol):
    """Takes readings. Any thread may call its methods, and none of them waits."""

    @property
    def asking(self) -> frozenset[str]:
        """Names of the routes that ask the model; of the others only alarms are shown."""

    @property
    def displayed(self) -> Sequence[tuple[str, str]]:
        """Routes and sensors of earlier runs; a dashboard can show them at once."""

    @property
    def filters(self) -> tuple[str, ...]:
        """The topic filters to subscribe to; no two of them overlap."""

    def listen(self, on: bool) -> None:
        """Note whether readings can arrive; while they can't, no sensor counts as silent."""

    def reading(self, topic: str, payload: bytes) -> None:
        """Take one message of a sensor."""
