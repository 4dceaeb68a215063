"""The configuration file: every key is read, and each mistake is named with file, line and key."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.config import Config, load
from edge.errors import ConfigError

SMALLEST = 'bundle = "b"\n[mqtt]\n'
FULL = """
node = "pump-house"
bundle = "bundles/current"
cache_directory = "/var/cache/edge"
state_directory = "state"
threads = 2
context = 1024
queue = 3
drain_s = 1.5
metrics_file = "/run/edge-gemma/edge-gemma.prom"
log_payloads = true

[mqtt]
host = "broker.lan"
tls = true
ca_file = "ca.pem"
certificate_file = "node.pem"
key_file = "/etc/edge/node.key"
username = "edge"
password_file = "secret"
keepalive_s = 10
session_expiry_s = 60
reply_prefixes = ["sensors/", "ha/"]
discovery_prefix = "homeassistant"

[[serial]]
port = "/dev/ttyUSB0"

[[serial]]
port = "/dev/ttyACM0"
baud = 9600
flow_control = "xonxoff"
lenient = true
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "edge.toml"
    path.write_text(text)
    return path


def read(tmp_path: Path, text: str) -> Config:
    return load(write(tmp_path, text))


@pytest.fixture(autouse=True)
def _no_systemd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CREDENTIALS_DIRECTORY", "CACHE_DIRECTORY", "STATE_DIRECTORY", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_every_key_is_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret\n")
    config = read(tmp_path, FULL)
    assert (config.node, config.threads, config.context, config.queue, config.drain_s) == (
        "pump-house",
        2,
        1024,
        3,
        1.5,
    )
    assert config.bundle == tmp_path / "bundles/current"
    assert config.cache_directory == Path("/var/cache/edge")
    assert config.state_directory == tmp_path / "state"
    assert config.metrics_file == Path("/run/edge-gemma/edge-gemma.prom")
    assert config.log_payloads
    assert config.mqtt is not None
    assert (
        config.mqtt.broker.host,
        config.mqtt.broker.port,
        config.mqtt.broker.username,
        config.mqtt.broker.password,
    ) == (
        "broker.lan",
        8883,
        "edge",
        "s3cret",
    )
    assert config.mqtt.broker.ca_file == tmp_path / "ca.pem"
    assert config.mqtt.broker.key_file == Path("/etc/edge/node.key")
    assert config.mqtt.reply_prefixes == ("sensors/", "ha/")
    assert config.mqtt.discovery_prefix == "homeassistant"
    assert [(port.port, port.baud, port.flow_control, port.lenient) for port in config.serial] == [
        ("/dev/ttyUSB0", 115_200, "none", False),
        ("/dev/ttyACM0", 9600, "xonxoff", True),
    ]


def test_a_bundle_and_a_transport_are_sufficient(tmp_path: Path) -> None:
    config = read(tmp_path, SMALLEST)
    assert config.mqtt is not None
    assert (config.mqtt.broker.host, config.mqtt.broker.port, config.mqtt.broker.password) == (
        "127.0.0.1",
        1883,
        None,
    )
    assert config.node
    assert config.cache_directory == tmp_path / "cache" / "edge-gemma"
    assert config.state_directory == tmp_path / "home" / ".local/state" / "edge-gemma"
    assert config.context is None
    assert config.metrics_file is None
    assert not config.log_payloads


def test_the_directories_of_systemd_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", "/var/cache/edge")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/edge:/var/lib/other")
    config = read(tmp_path, SMALLEST)
    assert (config.cache_directory, config.state_directory) == (
        Path("/var/cache/edge"),
        Path("/var/lib/edge"),
    )


def test_a_systemd_credential_takes_precedence_over_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = SMALLEST + 'username = "u"\npassword_file = "secret"\n'
    (tmp_path / "secret").write_text("from the file")
    (tmp_path / "credentials").mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    config = read(tmp_path, text)
    assert config.mqtt is not None
    assert config.mqtt.broker.password == "from the file"
    (tmp_path / "credentials" / "secret").write_text("from systemd\n")
    config = read(tmp_path, text)
    assert config.mqtt is not None
    assert config.mqtt.broker.password == "from systemd"


def test_outside_the_unit_a_credential_is_read_from_the_credential_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    monkeypatch.setattr("edge.config.CREDENTIAL_STORE", tmp_path / "store")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "edge-gemma.secret").write_text("from the store\n")
    config = read(tmp_path, SMALLEST + 'username = "u"\npassword_file = "secret"\n')
    assert config.mqtt is not None
    assert config.mqtt.broker.password == "from the store"


def test_a_password_is_not_in_the_representation(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret")
    assert "s3cret" not in repr(read(tmp_path, FULL))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('bundel = "b"\n', ":1: unknown key bundel; allowed: node, bundle, bundle_key_file"),
        ("[mqtt]\n", ": bundle is missing"),
        ('bundle = "b"\n', ": [mqtt] or [[serial]] is required; both are missing"),
        ('bundle = "b"\n\n[mqtt]\nhosts = "x"\n', ":4: unknown key mqtt.hosts; allowed: host, port, tls"),
        ('bundle = "b"\n[mqtt]\npassword = "x"\n', ":3: unknown key mqtt.password; allowed: "),
        (
            'bundle = "b"\n[mqtt]\nport = "x"\n',
            ":3: mqtt.port is a string; allowed: an integer from 1 to 65535",
        ),
        ('bundle = "b"\n[mqtt]\nport = 0\n', ":3: mqtt.port is 0; allowed: an integer"),
        ('bundle = "b"\n[mqtt]\nport = 1979-05-27\n', ":3: mqtt.port is a date or time"),
        ('bundle = "b"\nmqtt = 3\n', ":2: mqtt is a number; allowed: a table, [mqtt]"),
        ('bundle = "b"\n[serial]\nport = "a"\n', ":2: serial is an object; allowed: tables, [[serial]]"),
        ('bundle = "b"\n[[serial]]\nport = "a"\n[[serial]]\nbaud = 9600\n', ":4: serial[1].port is missing"),
        (
            'bundle = "b"\n[[serial]]\nport = "a"\n[[serial]]\nport = "b"\nbaud = 9\n',
            ":6: serial[1].baud is 9; allowed: an integer from 1200",
        ),
        (
            'bundle = "b"\n[[serial]]\nport = "a"\nflow_control = "x"\n',
            ":4: serial[0].flow_control is 'x'; allowed: none, xonxoff, rtscts",
        ),
        ('node = "a/b"\nbundle = "b"\n[mqtt]\n', ":1: node is not valid; allowed: 1 to 64 characters"),
        ('bundle = ""\n[mqtt]\n', ":1: bundle is empty"),
        ('bundle = "b"\n[mqtt]\nca_file = "x"\n', ":3: mqtt.ca_file needs TLS; set tls = true"),
        ('bundle = "b"\n[mqtt]\ntls = true\nkey_file = "x"\n', ":2: mqtt.certificate_file and mqtt.key_file"),
        ('bundle = "b"\n[mqtt]\npassword_file = "x"\n', ":3: mqtt.password_file needs mqtt.username"),
        (
            'bundle = "b"\n[mqtt]\nusername = "u"\npassword_file = "/nowhere/x"\n',
            ":4: mqtt.password_file /nowhere/x: can't be read: No such file or directory",
        ),
        (
            'bundle = "b"\n[mqtt]\nreply_prefixes = ["a/#"]\n',
            ":3: mqtt.reply_prefixes[0] is 'a/#'; allowed: the start of a topic, without +, # and NUL",
        ),
        ('bundle = "b"\n[mqtt]\nreply_prefixes = [""]\n', ":3: mqtt.reply_prefixes[0] is empty"),
        (
            'bundle = "b"\n[[serial]]\nport = "a"\n[[route]]\nname = "r"\ntopics = ["s/#"]\n'
            '[route.trigger]\nwhen = "last >"\n',
            ":8: route[0].trigger.when is not JMESPath",
        ),
        (
            'bundle = "b"\n[mqtt]\n[[route]]\nname = "r"\nevent_topic = "e"\ntopics = ["s/#"]\n'
            "trigger = { every_s = 1 }\n[[route]]\n\ntrigger = { every = 5 }\n",
            ":8: route[1].name is missing",
        ),
        (
            'bundle = "b"\n[mqtt]\n[[route]]\nname = "r"\ntopics = ["s/#", "s#"]\ntrigger = { every = 5 }\n',
            ":5: route[0].topics[1] is 's#'; allowed: a topic filter",
        ),
        (
            'bundle = "b"\n[mqtt]\n[[route]]\nname = "r"\ntopics = []\ntrigger.every = 5\n',
            ":5: route[0].topics has 0 items",
        ),
        ('bundle = "b"\nbundle = "c"\n', ":2: duplicate key"),
        ('bundle = "b"\n[mqtt]\n\n[mqtt]\n', ":4: duplicate table"),
        ('bundle = "b"\nnode = \n', ":2: not TOML: Invalid value"),
        (
            'bundle = "b"\n[mqtt]\nhost = "broker.lan:1884"\n',
            ":3: mqtt.host is 'broker.lan:1884'; allowed: a host",
        ),
        ('bundle = "b"\n[mqtt]\nhost = "[::1]"\n', ":3: mqtt.host is '[::1]'; allowed: a host"),
        ("bundle", ": not TOML: "),
        (f"threads = {'9' * 5000}\n", ": not TOML: Exceeds the limit"),
        (f"bundle = {'[' * 5000}\n", ": not a configuration: nested too deeply"),
    ],
)
def test_a_mistake_is_reported_with_file_line_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"edge\.toml: can't be read: No such file or directory"):
        load(tmp_path / "edge.toml")


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "edge.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"edge\.toml: not UTF-8 text"):
        load(tmp_path / "edge.toml")


keys = st.sampled_from(
    ["node", "bundle", "threads", "mqtt", "serial", "port", "host", "tls", "baud", "x", '"a b"']
)
values = st.sampled_from(["1", '"a"', "true", "[]", "{}", "[{}]", "1979-05-27", "-1.5", "nan", '["a", 1]'])
lines = st.sampled_from(["[mqtt]", "[[serial]]", "[x]"]) | st.builds("{} = {}".format, keys, values)


@given(st.lists(lines, max_size=8).map("\n".join))
def test_any_file_is_read_or_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = write(tmp_path_factory.getbasetemp(), text)
    try:
        load(path)
    except ConfigError as error:
        refusal = str(error)
    else:
        return
    assert refusal.startswith(str(path))
    assert refusal.isprintable()
