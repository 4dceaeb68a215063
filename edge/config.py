"""The daemon's configuration: one TOML file; an error names the file, the line and the key.

    node = "pump-house"                # default: the host name
    bundle = "bundles/current"         # relative paths start at the file's directory

    [mqtt]
    host = "broker.lan"
    username = "edge"
    password_file = "mqtt-password"    # a systemd credential of this name if there is one, else a file

    [[serial]]
    port = "/dev/ttyUSB0"

    [[route]]                          # see `edge.routes.config`

All keys are in docs/configuration.md. Secrets are in files or systemd credentials, never in the TOML file.
"""

from __future__ import annotations

import os
import re
import socket
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from edge import defaults
from edge.endpoints import Broker, SerialConfig
from edge.errors import ConfigError
from edge.protocol.checks import FieldError, array, flag, integer, number, one_of, text
from edge.protocol.strict_json import kind_of, printable
from edge.routes.config import Route, parse_routes

_NODE = re.compile(r"[A-Za-z0-9_-]{1,64}")
REQUIRED = object()
CREDENTIAL_STORE = Path("/etc/credstore")  # the unit's LoadCredential= reads it; for root only


@dataclass(frozen=True)
class MqttConfig:
    """The connection to the broker.

    `session_expiry_s` is how long the broker keeps the session of an absent daemon, in seconds. A response
    topic must start with one of `reply_prefixes` or with the node's own prefix for replies.
    `discovery_prefix` is Home Assistant's; None: no discovery. The password was read from `password_path`.
    """

    broker: Broker
    session_expiry_s: int
    reply_prefixes: tuple[str, ...]
    discovery_prefix: str | None = None
    password_path: Path | None = None


@dataclass(frozen=True)
class Config:
    """All settings. `context` is in tokens, None for the bundle's; `drain_s` is in seconds.

    With a `bundle_key_file`, a bundle must be signed with one of its keys. At most `queue` requests wait.
    `cache_directory` can be lost at any time, `state_directory` must not. `metrics_file` is written for
    Prometheus; with `log_payloads` the log contains requests and answers.
    """

    path: Path
    node: str
    bundle: Path
    bundle_key_file: Path | None
    cache_directory: Path
    state_directory: Path
    threads: int
    context: int | None
    queue: int
    drain_s: float
    metrics_file: Path | None
    log_payloads: bool
    mqtt: MqttConfig | None
    serial: tuple[SerialConfig, ...]
    routes: tuple[Route, ...]


class Key(NamedTuple):
    """How a key is checked, and its default: a value, a function that gives it, or `REQUIRED` (required)."""

    check: Callable[[str, Any], Any]
    default: Any = REQUIRED


def load(path: Path, secrets: bool = True) -> Config:
    """Read and check the configuration in `path`; without `secrets` the password is not read.

    Raises ConfigError: one line with the file, the line and the key.
    """
    try:
        source = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    try:
        document = tomllib.loads(source)
    except RecursionError:
        raise ConfigError(f"{path}: not a configuration: nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, or a number with thousands of digits
        raise ConfigError(f"{path}{_toml_error(str(error))}") from None
    return _Reader(path, source, secrets).config(document)


class _Reader:
    """Checks one document; has its path and lines for messages."""

    def __init__(self, path: Path, source: str, secrets: bool) -> None:
        self._path, self._secrets = path, secrets
        self._lines = source.splitlines()

    def config(self, document: Mapping[str, Any]) -> Config:
        top = self._section("", document, TOP_KEYS)
        mqtt, ports, routes = top.pop("mqtt"), top.pop("serial"), top.pop("route")
        if mqtt is None and not ports:
            raise ConfigError(f"{self._path}: [mqtt] or [[serial]] is required; both are missing")
        for name in ("bundle", "bundle_key_file", "cache_directory", "state_directory", "metrics_file"):
            top[name] = None if top[name] is None else self._from_here(top[name])
        serial = [self._serial(index, table) for index, table in enumerate(ports)]
        return Config(
            path=self._path,
            mqtt=None if mqtt is None else self._mqtt(mqtt),
            serial=tuple(serial),
            routes=self._routes(routes),
            **top,
        )

    def _mqtt(self, table: Mapping[str, Any]) -> MqttConfig:
        values = self._section("mqtt", table, MQTT_KEYS)
        for name in ("ca_file", "certificate_file", "key_file"):
            if values[name] is not None:
                values[name] = self._from_here(values[name])
                if not values["tls"]:
                    raise self._error(f"mqtt.{name}", f"mqtt.{name} needs TLS; set tls = true")
        if (values["certificate_file"] is None) != (values["key_file"] is None):
            raise self._error("mqtt", "mqtt.certificate_file and mqtt.key_file are only valid together")
        if values["port"] is None:
            values["port"] = 8883 if values["tls"] else 1883
        secret = values.pop("password_file")
        if secret is not None and values["username"] is None:
            raise self._error("mqtt.password_file", "mqtt.password_file needs mqtt.username")
        own = {name: values.pop(name) for name in ("session_expiry_s", "reply_prefixes", "discovery_prefix")}
        path = None if secret is None else self._secret_path(secret)
        password = None if path is None or not self._secrets else self._secret(path)
        return MqttConfig(Broker(password=password, **values), password_path=path, **own)

    def _serial(self, index: int, table: Mapping[str, Any]) -> SerialConfig:
        return SerialConfig(**self._section(f"serial[{index}]", table, SERIAL_KEYS))

    def _routes(self, tables: Sequence[Mapping[str, Any]]) -> tuple[Route, ...]:
        try:
            return parse_routes(tables)
        except ConfigError as error:
            key = re.match(r"[\w.\[\]]*", str(error))
            raise self._error(key[0] if key else "route", str(error)) from None

    def _section(self, where: str, table: Mapping[str, Any], keys: Mapping[str, Key]) -> dict[str, Any]:
        """Check the keys of one table and fill in the defaults."""
        prefix = f"{where}." if where else ""
        for name in table:
            if name not in keys:
                raise self._error(
                    prefix + name, f"unknown key {prefix}{printable(name)[1:-1]}; allowed: {', '.join(keys)}"
                )
        values = {}
        for name, key in keys.items():
            if name in table:
                try:
                    values[name] = key.check(prefix + name, table[name])
                except FieldError as error:
                    raise self._error(prefix + name, str(error)) from None
            elif key.default is REQUIRED:
                raise self._error(where, f"{prefix}{name} is missing")
            else:
                values[name] = key.default() if callable(key.default) else key.default
        return values

    def _secret_path(self, name: str) -> Path:
        """Find a secret: the systemd credential `name` (systemd.exec(5)) if there is one, or else a file.

        Outside the unit, as for the doctor, a credential is the file that the unit loads it from.
        """
        credentials = os.environ.get("CREDENTIALS_DIRECTORY")
        places = [Path(credentials, name)] if credentials else []
        places += [self._from_here(name), CREDENTIAL_STORE / f"edge-gemma.{name}"]
        return next((place for place in places if os.path.isfile(place)), self._from_here(name))

    def _secret(self, path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            message = f"mqtt.password_file {path}: can't be read: {reason}"
            raise self._error("mqtt.password_file", message) from None

    def _from_here(self, name: str) -> Path:
        return (self._path.parent / name).absolute()

    def _error(self, key: str, message: str) -> ConfigError:
        line = _find(self._lines, key)
        return ConfigError(f"{self._path}:{line}: {message}" if line else f"{self._path}: {message}")


def _toml_error(message: str) -> str:
    """Put the line of one of tomllib's errors in front, and name a duplicate key as such."""
    place = re.fullmatch(r"(.*) \(at line (\d+), column \d+\)", message)
    reason, line = (place[1], f":{place[2]}") if place else (message, "")
    if reason.startswith("Cannot overwrite a value"):
        return f"{line}: duplicate key"
    if re.match(r"Cannot declare .* twice", reason):
        return f"{line}: duplicate table"
    return f"{line}: not TOML: {reason}"


def _find(lines: list[str], key: str) -> int:
    """Find the line, from 1, of a key such as `serial[1].baud`, or of its table; 0 if there is none."""
    while key:
        for number_, (table, name) in enumerate(_places(lines), 1):
            if f"{table}.{name}".strip(".") == key:
                return number_
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return 0


def _places(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Give the table and the key of each line; a header has no key."""
    table, counts = "", Counter[str]()
    for line in lines:
        header = re.match(r"\s*(\[\[?)\s*([\w.-]+)\s*\]", line)
        key = re.match(r"\s*[\"']?([\w-]+)[\"']?\s*[.=]", line)
        if header:
            first, dot, rest = header[2].partition(".")
            counts[first] += header[1] == "[[" and not dot
            table = first + (f"[{counts[first] - 1}]" if counts[first] else "") + dot + rest
        yield table, key[1] if key and not header else ""


def _node(path: str, value: Any) -> str:
    if not isinstance(value, str) or not _NODE.fullmatch(value):
        raise FieldError(f"{path} is not valid; allowed: 1 to 64 characters A-Z a-z 0-9 _ -")
    return value


def _host_name() -> str:
    name = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname().partition(".")[0])[:64]
    return name or "edge"


def _not_empty(path: str, value: Any) -> str:
    if not text(path, value):
        raise FieldError(f"{path} is empty; allowed: a string of at least 1 character")
    return str(value)


def _host(path: str, value: Any) -> str:
    host = _not_empty(path, value)
    if host.startswith("[") or host.count(":") == 1:
        raise FieldError(f"{path} is {printable(host)}; allowed: a host name or address; port is another key")
    return host


def _prefix(path: str, value: Any) -> str:
    if not _not_empty(path, value) or any(c in value for c in "+#\0"):
        raise FieldError(f"{path} is {printable(value)}; allowed: the start of a topic, without +, # and NUL")
    return str(value)


def _prefixes(path: str, value: Any) -> tuple[str, ...]:
    return tuple(_prefix(f"{path}[{i}]", item) for i, item in enumerate(array(path, value, most=64)))


def _table(path: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise FieldError(f"{path} is {kind_of(value)}; allowed: a table, [{path}]")
    return value


def _tables(path: str, value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise FieldError(f"{path} is {kind_of(value)}; allowed: tables, [[{path}]]")
    return value


TOP_KEYS = {
    "node": Key(_node, _host_name),
    "bundle": Key(_not_empty),
    "bundle_key_file": Key(_not_empty, None),
    "cache_directory": Key(_not_empty, defaults.cache_directory),
    "state_directory": Key(_not_empty, defaults.state_directory),
    "threads": Key(integer(1, 64), defaults.threads),
    "context": Key(integer(16, 131_072), None),
    "queue": Key(integer(1, 1024), 8),
    "drain_s": Key(number(0, 600), 20.0),
    "metrics_file": Key(_not_empty, None),
    "log_payloads": Key(flag, False),
    "mqtt": Key(_table, None),
    "serial": Key(_tables, ()),
    "route": Key(_tables, ()),
}

MQTT_KEYS = {
    "host": Key(_host, "127.0.0.1"),
    "port": Key(integer(1, 65_535), None),
    "tls": Key(flag, False),
    "ca_file": Key(_not_empty, None),
    "certificate_file": Key(_not_empty, None),
    "key_file": Key(_not_empty, None),
    "username": Key(_not_empty, None),
    "password_file": Key(_not_empty, None),
    "keepalive_s": Key(integer(5, 3600), 30),
    "session_expiry_s": Key(integer(0, 604_800), 3600),
    "reply_prefixes": Key(_prefixes, ()),
    "discovery_prefix": Key(_prefix, None),
}

SERIAL_KEYS = {
    "port": Key(_not_empty),
    "baud": Key(integer(1200, 4_000_000), 115_200),
    "flow_control": Key(one_of("none", "xonxoff", "rtscts"), "none"),
    "lenient": Key(flag, False),
}
