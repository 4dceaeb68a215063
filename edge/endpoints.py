"""What a transport connects to: a broker or a serial port. Daemon and clients share these."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Broker:
    """How to reach a broker. `keepalive_s` is MQTT's keepalive, in seconds."""

    host: str = "127.0.0.1"
    port: int = 1883
    tls: bool = False
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    keepalive_s: int = 30

    @property
    def address(self) -> str:
        """Host and port for messages, with an IPv6 address in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True)
class SerialConfig:
    """One port. `lenient` also accepts lines without a CRC, for typing by hand."""

    port: str
    baud: int = 115_200
    flow_control: str = "none"
    lenient: bool = False
