"""The files for the board: each is tested with the program that reads it."""

from __future__ import annotations

import importlib
import os
import queue
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion

from edge.config import load
from tests.support.counterparts import WAIT_S, free_port, wait_for

PROJECT = Path(__file__).parents[2]
CONFIGS = PROJECT / "firmware_configs"
GUIDE = (PROJECT / "docs" / "deployment.md").read_text()
UNIT = CONFIGS / "systemd" / "edge-daemon.service"
BOARDS = ["zero-2-w", "pi-3", "pi-4", "pi-5", "arm64"]

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, with a program that exists here."""
    copy = tmp_path / UNIT.name
    text = UNIT.read_text()
    assert "ExecStart=/usr/bin/edge-daemon run" in text
    copy.write_text(text.replace("/usr/bin/edge-daemon", "/bin/true"))
    return copy


@needs_systemd
def test_the_unit_has_an_exposure_of_at_most_two(unit: Path) -> None:
    checked = run("systemd-analyze", "security", "--offline=true", "--threshold=20", unit)
    assert checked.returncode == 0, checked.stdout
    assert "Overall exposure level" in checked.stdout


@needs_systemd
@pytest.mark.parametrize("board", [None, *BOARDS])
def test_systemd_accepts_the_unit_and_its_drop_ins(unit: Path, board: str | None) -> None:
    if board is not None:
        folder = unit.with_name(unit.name + ".d")
        folder.mkdir()
        shutil.copy(CONFIGS / "boards" / f"{board}.conf", folder / "memory.conf")
    checked = run("systemd-analyze", "verify", "--man=no", "--recursive-errors=yes", unit)
    assert (checked.returncode, checked.stderr) == (0, "")


@needs_systemd
def test_a_mistake_in_the_unit_is_detected(unit: Path) -> None:
    unit.write_text(unit.read_text().replace("RestartSec=3", "RestartSecs=3"))
    checked = run("systemd-analyze", "verify", "--man=no", "--recursive-errors=yes", unit)
    assert checked.returncode != 0
    assert "RestartSecs" in checked.stderr


WITHOUT_WRITABLE_CODE = """
import ctypes, mmap, sys
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1  # what MemoryDenyWriteExecute= sets, linux/prctl.h
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) != 0:
    sys.exit("no PR_SET_MDWE")
try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
except PermissionError:
    pass
else:
    sys.exit("writable code is still allowed")
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_ctypes_callbacks_and_litert_work_without_writable_code() -> None:
    """MemoryDenyWriteExecute= breaks libraries that write code at run time; LiteRT is not among them."""
    tests = Path(__file__).parents[1] / "runtime" / "test_litert.py"
    checked = run(sys.executable, "-c", WITHOUT_WRITABLE_CODE, tests)
    if checked.stderr.startswith("no PR_SET_MDWE"):
        pytest.skip("the kernel is older than 6.3")
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("board", BOARDS)
def test_every_board_has_a_profile_that_the_daemon_accepts(board: str) -> None:
    config = load(CONFIGS / "boards" / f"{board}.toml")
    assert config.bundle == Path("/var/lib/edge-gemma/bundles/current")
    assert config.threads <= 4
    assert config.context is not None
    assert config.mqtt is not None


def test_profiles_and_drop_ins_are_consistent() -> None:
    names = {path.stem for path in (CONFIGS / "boards").iterdir()}
    assert names == set(BOARDS)


def udev_rules() -> list[str]:
    lines = (CONFIGS / "udev" / "65-edge-gemma.rules").read_text().splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def test_udev_rules_follow_the_grammar_of_udev() -> None:
    """Key, operator and quoted value; `==` and `!=` only for what can be matched, per udev(7)."""
    match = r"(ACTION|SUBSYSTEMS?|KERNELS?|DRIVERS?|ENV\{\w+\}|ATTRS?\{[\w/]+\})(==|!=)"
    assign = r"(SYMLINK|GROUP|MODE|RUN|ENV\{\w+\}|GOTO|LABEL)(=|\+=)"
    for rule in udev_rules():
        for part in re.split(r",\s+(?=[A-Z])", rule):
            assert re.fullmatch(rf'({match}|{assign})"[^"]+"', part), part
    labels = re.findall(r'LABEL="(\w+)"', "\n".join(udev_rules()))
    assert set(re.findall(r'GOTO="(\w+)"', "\n".join(udev_rules()))) == set(labels)


@pytest.mark.skipif(shutil.which("udevadm") is None, reason="udevadm is not installed")
def test_udevadm_accepts_the_rules() -> None:
    checked = run("udevadm", "verify", CONFIGS / "udev" / "65-edge-gemma.rules")
    if "Unknown command" in checked.stderr or "Unrecognized" in checked.stderr:
        pytest.skip("udevadm is older than systemd 254")
    assert checked.returncode == 0, checked.stdout + checked.stderr


USB_DEVICE = {  # below /sys; a name that ends with : is a link
    "devices/platform/soc/uevent": "DRIVER=soc\n",
    "devices/platform/soc/subsystem:": "bus/platform",
    "devices/platform/soc/1.usb/uevent": "DRIVER=dwc2\n",
    "devices/platform/soc/1.usb/subsystem:": "bus/platform",
    "devices/platform/soc/1.usb/1-1/uevent": "DEVTYPE=usb_device\n",
    "devices/platform/soc/1.usb/1-1/subsystem:": "bus/usb",
    "devices/platform/soc/1.usb/1-1/idVendor": "0403\n",
    "devices/platform/soc/1.usb/1-1/idProduct": "6001\n",
    "devices/platform/soc/1.usb/1-1/serial": "A50285BI\n",
    "devices/platform/soc/1.usb/1-1/1-1:1.0/uevent": "DEVTYPE=usb_interface\n",
    "devices/platform/soc/1.usb/1-1/1-1:1.0/subsystem:": "bus/usb",
    "devices/platform/soc/1.usb/1-1/1-1:1.0/bInterfaceNumber": "00\n",
    "devices/platform/soc/1.usb/1-1/1-1:1.0/bInterfaceClass": "ff\n",
    "devices/platform/soc/1.usb/1-1/1-1:1.0/ttyUSB0/uevent": "DRIVER=ftdi_sio\n",
    "devices/platform/soc/1.usb/1-1/1-1:1.0/ttyUSB0/subsystem:": "bus/usb-serial",
    "devices/platform/soc/1.usb/1-1/1-1:1.0/ttyUSB0/driver:": "bus/usb-serial/drivers/ftdi_sio",
    "devices/platform/soc/1.usb/1-1/1-1:1.0/ttyUSB0/port_number": "0\n",
    "devices/platform/soc/1.usb/1-1/1-1:1.0/ttyUSB0/latency_timer": "16\n",
    "devices/platform/soc/1.usb/1-1/1-1:1.0/ttyUSB0/tty/ttyUSB0/uevent": (
        "MAJOR=188\nMINOR=0\nDEVNAME=ttyUSB0\n"
    ),
    "devices/platform/soc/1.usb/1-1/1-1:1.0/ttyUSB0/tty/ttyUSB0/subsystem:": "class/tty",
}
PLUGGED_IN = """
set -e
mount -t tmpfs dev "$2"
touch "$2/null"
mount --bind /dev/null "$2/null"
mount --rbind "$2" /dev
mount --bind "$1" /sys
mount -t tmpfs run /run
mkdir -p /run/udev/rules.d
cp "$3" /run/udev/rules.d
SYSTEMD_DEVICE_VERIFY_SYSFS=0 exec udevadm test --action=add /sys/class/tty/ttyUSB0
"""


@pytest.mark.skipif(shutil.which("udevadm") is None, reason="udevadm is not installed")
def test_a_usb_adapter_gets_its_names_together_with_the_rules_of_udev(tmp_path: Path) -> None:
    if run("unshare", "-rm", "true").returncode != 0:
        pytest.skip("no namespaces of one's own here")
    sys_, dev = tmp_path / "sys", tmp_path / "dev"
    dev.mkdir()
    for name, content in USB_DEVICE.items():
        path = sys_ / name.rstrip(":")
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(":"):
            (sys_ / content).mkdir(parents=True, exist_ok=True)
            path.symlink_to(os.path.relpath(sys_ / content, path.parent))
        else:
            path.write_text(content)
    tty = sys_ / "devices/platform/soc/1.usb/1-1/1-1:1.0/ttyUSB0/tty/ttyUSB0"
    (sys_ / "class/tty/ttyUSB0").symlink_to(os.path.relpath(tty, sys_ / "class/tty"))
    rules = CONFIGS / "udev" / "65-edge-gemma.rules"
    tested = run("unshare", "-rm", "sh", "-c", PLUGGED_IN, "sh", sys_, dev, rules)
    assert tested.returncode == 0, tested.stderr
    assert re.search(r"^ *DEVLINKS=.*/dev/edge/A50285BI\b", tested.stdout, re.MULTILINE), tested.stdout
    assert "/dev/edge/port-platform-1.usb-usb-0:1:1.0" in tested.stdout
    assert "ID_MM_DEVICE_IGNORE=1" in tested.stdout
    assert "usb-serial/devices/ttyUSB0/latency_timer" in tested.stdout


def test_the_kernel_command_line_fragment_is_one_line_of_words() -> None:
    text = (CONFIGS / "boot" / "cmdline.txt").read_text()
    assert text.count("\n") == 1
    assert "cgroup_enable=memory" in text.split()


def test_cloud_init_installs_what_the_package_ships() -> None:
    text = (CONFIGS / "cloud-init" / "user-data.yaml").read_text()
    assert text.startswith("#cloud-config\n")
    data = importlib.import_module("yaml").safe_load(text)
    (script,) = data["write_files"]
    assert data["runcmd"] == [[script["path"]]]
    assert run("sh", "-n", input=script["content"]).returncode == 0
    for name in re.findall(r"\$share/([\w./-]+)(?=[\" )])", script["content"]):
        assert (CONFIGS / name).is_file(), name
    for board in BOARDS:
        assert board in text
    for name, place in re.findall(r"^\| `([\w.-]+\.conf)` \| `(/etc/[\w./-]+)` \|", GUIDE, re.MULTILINE):
        assert f'"$share/systemd/{name}" {place}\n' in script["content"]


@pytest.mark.parametrize("name", ["mosquitto/make-certificates"])
def test_shell_scripts_parse_and_are_executable(name: str) -> None:
    assert run("sh", "-n", CONFIGS / name).returncode == 0
    assert os.access(CONFIGS / name, os.X_OK)


@dataclass
class Broker:
    """A mosquitto with the shipped configuration, except for paths and ports."""

    port: int
    tls_port: int
    certificates: Path


PASSWORDS = {"edge-node": "n", "alice": "a", "probe1": "p", "home-assistant": "h"}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    certificates = tmp_path / "certificates"
    made = run(CONFIGS / "mosquitto" / "make-certificates", certificates, "localhost", "127.0.0.1")
    assert made.returncode == 0, made.stderr
    passwords = tmp_path / "passwords"
    passwords.touch()
    for user, password in PASSWORDS.items():
        assert run("mosquitto_passwd", "-b", passwords, user, password).returncode == 0
    started = Broker(free_port(), free_port(), certificates)
    text = (CONFIGS / "mosquitto" / "edge-gemma.conf").read_text()
    for old, new in {
        "listener 1883 localhost": f"listener {started.port} localhost",
        "listener 8883\n": f"listener {started.tls_port} localhost\n",
        "/etc/mosquitto/certificates": str(certificates),
        "/etc/mosquitto/edge-passwords": str(passwords),
        "/etc/mosquitto/edge-gemma.acl": str(CONFIGS / "mosquitto" / "edge-gemma.acl"),
    }.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "edge-gemma.conf").write_text(text + ("user root\n" if os.geteuid() == 0 else ""))
    config = tmp_path / "mosquitto.conf"
    config.write_text(  # Debian's own, which reads what is in conf.d
        f"pid_file {tmp_path}/pid\npersistence true\npersistence_location {tmp_path}/\n"
        f"log_dest stderr\ninclude_dir {tmp_path}/conf.d\n"
    )
    program = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
    log = (tmp_path / "log").open("w")
    with log, subprocess.Popen([program, "-c", str(config)], stderr=log) as process:
        wait_for(lambda: "running" in (tmp_path / "log").read_text() or process.poll() is not None)
        assert process.poll() is None, (tmp_path / "log").read_text()
        yield started
        process.terminate()
        process.wait(WAIT_S)


@dataclass
class User:
    client: Client
    received: queue.Queue[MQTTMessage]
    codes: queue.Queue[Any]

    def receives(self, topic: str, sender: User, payload: str) -> bool:
        """Return whether a message that another user publishes on `topic` arrives."""
        self.client.subscribe(topic, qos=1)
        granted = self.codes.get(timeout=WAIT_S)
        sender.client.publish(topic, payload, qos=1).wait_for_publish(WAIT_S)
        self.client.publish("edge/v1/x/request", "", qos=1).wait_for_publish(WAIT_S)
        if granted[0].is_failure:
            return False
        try:
            return self.received.get(timeout=0.3).payload == payload.encode()
        except queue.Empty:
            return False


@pytest.fixture
def login(broker: Broker) -> Iterator[Callable[..., User]]:
    clients: list[Client] = []

    def connect(user: str, tls: bool = False, host: str = "localhost") -> User:
        client = Client(CallbackAPIVersion.VERSION2)
        clients.append(client)
        made = User(client, queue.Queue(), queue.Queue())
        client.username_pw_set(user, PASSWORDS.get(user, "wrong"))
        client.on_message = lambda _c, _d, message: made.received.put(message)
        client.on_subscribe = lambda _c, _d, _m, codes, _p: made.codes.put(codes)
        client.on_connect = lambda _c, _d, _f, code, _p: made.codes.put(code)
        if tls:
            client.tls_set(str(broker.certificates / "ca.crt"))
        client.connect(host, broker.tls_port if tls else broker.port)
        client.loop_start()
        code = made.codes.get(timeout=WAIT_S)
        if code.is_failure:
            raise PermissionError(str(code))
        return made

    yield connect
    for client in clients:
        client.disconnect()
        client.loop_stop()


def test_the_broker_limits_each_user_to_its_own_topics(login: Callable[..., User]) -> None:
    node, alice, probe = login("edge-node"), login("alice"), login("probe1")
    assert node.receives("edge/v1/edge-node/request/alice", alice, "question")
    assert node.receives("edge/v1/edge-node/cancel/alice", alice, "cancellation")
    assert alice.receives("edge/v1/edge-node/reply/alice/1", node, "answer")
    assert alice.receives("edge/v1/edge-node/status", node, "online")
    assert node.receives("sensors/probe1/temperature", probe, "21.5")
    assert alice.receives("alarms/freezer", node, "warm")
    assert not probe.receives("edge/v1/edge-node/reply/alice/1", node, "answer for another")
    assert not alice.receives("edge/v1/edge-node/reply/alice/1", probe, "forged answer")
    assert not node.receives("sensors/probe1/temperature", alice, "forged reading")
    assert not alice.receives("edge/v1/edge-node/status", probe, "forged status")
    assert not probe.receives("edge/v1/edge-node/request/alice", alice, "overheard question")
    assert not node.receives("edge/v1/edge-node/request/alice", probe, "forged question")
    assert not node.receives("edge/v1/edge-node/cancel/alice", probe, "forged cancellation")
    assert not node.receives("edge/v1/edge-node/request", alice, "question without a user")


def test_home_assistant_sees_the_nodes_but_not_answers_to_others(login: Callable[..., User]) -> None:
    node, home = login("edge-node"), login("home-assistant")
    assert home.receives("homeassistant/device/edge-edge-node/config", node, "device")
    assert home.receives("edge/v1/edge-node/health", node, "health")
    assert home.receives("edge/v1/edge-node/routes/freezers", node, "state")
    assert node.receives("homeassistant/status", home, "online")
    assert not home.receives("edge/v1/edge-node/reply/alice/1", node, "answer for another")


def test_the_broker_refuses_unknown_users(login: Callable[..., User]) -> None:
    with pytest.raises(PermissionError, match="Not authorized"):
        login("stranger")


def test_clients_connect_to_the_broker_over_tls_and_verify_it(
    login: Callable[..., User], broker: Broker, tmp_path: Path
) -> None:
    alice = login("alice", tls=True)
    assert alice.receives(
        "edge/v1/edge-node/reply/alice/1", login("edge-node", tls=True, host="127.0.0.1"), "x"
    )
    foreign = tmp_path / "foreign"
    assert run(CONFIGS / "mosquitto" / "make-certificates", foreign, "localhost").returncode == 0
    context = ssl.create_default_context(cafile=foreign / "ca.crt")
    with (
        socket.create_connection(("localhost", broker.tls_port)) as plain,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        context.wrap_socket(plain, server_hostname="localhost")


def test_the_guide_s_certificate_is_for_the_host_that_its_node_connects_to(tmp_path: Path) -> None:
    (names,) = re.findall(r"make-certificates /etc/mosquitto/certificates (.+)", GUIDE)
    (host,) = re.findall(r'host = "(.+)"\n    tls = true', GUIDE)
    made = run(CONFIGS / "mosquitto" / "make-certificates", tmp_path / "made", *names.split())
    assert made.returncode == 0, made.stderr
    checked = run("openssl", "x509", "-in", tmp_path / "made/server.crt", "-noout", "-checkhost", host)
    assert "does match" in checked.stdout
    assert "does match" in run(*checked.args[:-1], names.split()[0]).stdout
    assert "does NOT match" in run(*checked.args[:-1], "elsewhere.lan").stdout


@pytest.mark.parametrize("arguments", [(), ("made",), ("made", "--client")])
def test_no_certificate_is_made_without_a_name(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    made = run(
        CONFIGS / "mosquitto" / "make-certificates",
        *(tmp_path / each if each == "made" else each for each in arguments),
    )
    assert (made.returncode, made.stdout) == (2, "")
    assert made.stderr.startswith("make-certificates DIRECTORY NAME...")
    assert not list(tmp_path.iterdir())


def test_a_node_can_read_the_certificate_of_the_authority_but_no_key(tmp_path: Path) -> None:
    made = run(CONFIGS / "mosquitto" / "make-certificates", tmp_path / "made", "localhost", umask=0o077)
    assert made.returncode == 0, made.stderr
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "made").iterdir()}
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o755
    assert (modes["ca.crt"], modes["ca.key"], modes["server.key"]) == (0o644, 0o600, 0o600)


def test_certificates_for_clients_come_from_the_same_authority(broker: Broker) -> None:
    before = (broker.certificates / "ca.crt").read_bytes()
    made = run(CONFIGS / "mosquitto" / "make-certificates", broker.certificates, "--client", "alice")
    assert made.returncode == 0, made.stderr
    certificate = broker.certificates / "alice.crt"
    ca = broker.certificates / "ca.crt"
    verified = run("openssl", "verify", "-purpose", "sslclient", "-CAfile", ca, certificate)
    assert verified.returncode == 0, verified.stderr
    assert ca.read_bytes() == before
    assert (broker.certificates / "alice.key").stat().st_mode & 0o077 == 0
