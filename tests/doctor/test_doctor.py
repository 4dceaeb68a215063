"""The doctor names each problem with its fix, on boards as their kernels describe themselves."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge.board import Board, Disk, Throttling
from edge.bundles.architecture import Architecture, Layer, Rope
from edge.bundles.bundle import FileEntry, Manifest, file_digest
from edge.bundles.record import DaemonRecord
from edge.bundles.row_table import RowTable
from edge.bundles.store import BundleStore
from edge.cli import daemon as cli
from edge.config import Config, load
from edge.doctor import board_checks, link_checks
from edge.doctor.doctor import as_json, as_text, examine
from edge.doctor.finding import Finding
from edge.doctor.sdram_check import check_sdram
from tests.support.counterparts import Mosquitto, PtyPair, free_port

PI_4 = {
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    "proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm crc32 cpuid\n"
    "CPU implementer\t: 0x41\nCPU part\t: 0xd08\n",
    "proc/meminfo": "MemTotal:        3884360 kB\nMemFree:         3000000 kB\nMemAvailable:    3441132 kB\n",
    "proc/swaps": "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n",
    "proc/cmdline": "console=serial0,115200 console=tty1 root=PARTUUID=1234-02 rootfstype=ext4 rootwait\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
    "sys/class/thermal/thermal_zone0/temp": "48199\n",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "0\n",
    "sys/fs/cgroup/cgroup.controllers": "cpuset cpu io pids\n",
}
PI_5_CPU = "Features\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp\n"

ARCHITECTURE = Architecture(
    family="gemma3",
    vocabulary=512,
    hidden=64,
    query_heads=4,
    kv_heads=1,
    sliding_window=512,
    rope_sliding=Rope(10_000.0),
    rope_full=Rope(1_000_000.0),
    attention_scale=0.0625,
    rms_epsilon=1e-6,
    max_positions=32_768,
    layers=(Layer("sliding", 256, 128, 0), Layer("full", 256, 128, 1)),
)


@pytest.fixture
def board(tmp_path: Path) -> Callable[..., Board]:
    """A Pi 4 with `changes` to the files of its kernel; None removes a file."""

    def make(**changes: str | None) -> Board:
        root = tmp_path / "root"
        for name, text in (PI_4 | {key.replace("__", "/"): value for key, value in changes.items()}).items():
            if text is not None:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(text)
        return Board(root)

    return make


def make_manifest(weights: int, **digests: str) -> Manifest:
    files = {"decoder.tflite": FileEntry(weights, digests.get("decoder", "0" * 64))}
    table = RowTable("decoder.tflite", 512, 64, 8, 0, 32_768, 1, "float32")
    return Manifest(
        ARCHITECTURE,
        8192,
        8,
        (128,),
        "plain",
        2,
        (1,),
        "int8",
        {"bytes_per_token": weights},
        table,
        table,
        None,
        files,
        {},
        "test",
        "test",
    )


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Config]:
    """A configuration with a bundle whose manifest claims `weights` bytes."""

    def make(weights: int = 5, lines: str = "[mqtt]\n", intact: bool = True) -> Config:
        bundle = tmp_path / "bundle"
        bundle.mkdir(exist_ok=True)
        (bundle / "decoder.tflite").write_bytes(b"graph" if intact else b"GRAPH")
        digest = "sha" if not intact else file_digest(bundle / "decoder.tflite")
        (bundle / "manifest.json").write_text(make_manifest(weights, decoder=digest).to_json())
        file = tmp_path / "edge-daemon.toml"
        file.write_text(
            'bundle = "bundle"\ncontext = 2048\nstate_directory = "state"\ncache_directory = "cache"\n'
            + lines
        )
        return load(file)

    return make


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_a_pi_4_without_dot_products_gets_a_warning(board: Callable[..., Board]) -> None:
    finding = only(list(board_checks.check_cpu(board())))
    assert (finding.state, "Raspberry Pi 4 Model B" in finding.message) == ("warning", True)


def test_a_pi_5_is_fine_unless_its_governor_is_powersave(board: Callable[..., Board]) -> None:
    assert only(list(board_checks.check_cpu(board(proc__cpuinfo=PI_5_CPU)))).state == "ok"
    governor = "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"
    findings = list(board_checks.check_cpu(board(**{"proc__cpuinfo": PI_5_CPU, governor: "powersave"})))
    assert [finding.state for finding in findings] == ["ok", "warning"]
    assert findings[1].fix is not None
    assert "scaling_governor" in findings[1].fix


@pytest.mark.parametrize(
    ("throttled", "temperature", "state", "message", "fix"),
    [
        ("0", "48199", "ok", "48 °C", None),
        ("50005", "60000", "problem", "60 °C, now: under-voltage, throttled", "power supply"),
        ("0x50000", "60000", "warning", "60 °C, since boot: under-voltage, throttled", "power supply"),
        ("80008", "81000", "problem", "81 °C, now: soft temperature limit", "heat sink"),
        (None, "85000", "warning", "85 °C: the processor throttles at this temperature", "heat sink"),
        (None, None, "unknown", "temperature unknown", None),
    ],
)
def test_heat_and_low_voltage_have_different_fixes(
    tmp_path: Path, throttled: str | None, temperature: str | None, state: str, message: str, fix: str | None
) -> None:
    for name, text in {
        "sys/class/thermal/thermal_zone0/temp": temperature,
        "sys/devices/platform/soc/soc:firmware/get_throttled": throttled,
    }.items():
        if text is not None:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
    finding = only(list(board_checks.check_power(Board(tmp_path))))
    assert (finding.state, finding.message) == (state, message)
    assert (finding.fix is None) if fix is None else (fix in str(finding.fix))


@pytest.mark.parametrize("soc", ["soc", "soc@107c000000"])  # the latter: a Pi 5 since Linux 6.12
def test_throttling_bits_are_decoded(tmp_path: Path, soc: str) -> None:
    path = tmp_path / f"sys/devices/platform/{soc}/{soc}:firmware/get_throttled"
    path.parent.mkdir(parents=True)
    path.write_text("70002\n")
    assert Board(tmp_path).throttling == Throttling(
        ("frequency capped",), ("under-voltage", "frequency capped", "throttled")
    )
    path.write_text("nonsense")
    assert Board(tmp_path).throttling is None


@pytest.mark.parametrize(
    ("weights", "state", "message"),
    [
        (270_000_000, "ok", "MB needed of 3977 MB"),
        (3_500_000_000, "warning", "3523 MB available"),
        (3_900_000_000, "problem", "the model does not fit"),
    ],
)
def test_memory_is_compared_with_what_the_model_needs(
    board: Callable[..., Board], config: Callable[..., Config], weights: int, state: str, message: str
) -> None:
    finding = only(list(board_checks.check_memory(board(), config(weights))))
    assert finding.state == state
    assert message in finding.message


def test_memory_of_the_running_daemon_counts_as_available(
    board: Callable[..., Board], config: Callable[..., Config]
) -> None:
    free = "MemTotal: 475000 kB\nMemAvailable: 225000 kB\n"  # a Zero 2 W on which it runs
    without = board(proc__meminfo=free)
    assert only(list(board_checks.check_memory(without, config(200_000_000)))).state == "warning"
    procs = "sys__fs__cgroup__system.slice__edge-daemon.service__cgroup.procs"
    status = "Name:\tedge-daemon\nRssAnon:\t  120000 kB\nRssFile:\t  200000 kB\n"
    running = board(**{"proc__meminfo": free, procs: "811\n", "proc__811__status": status})
    assert only(list(board_checks.check_memory(running, config(200_000_000)))).state == "ok"


def test_a_disabled_memory_controller_comes_with_the_command_that_enables_it(
    board: Callable[..., Board], config: Callable[..., Config]
) -> None:
    finding = only(list(board_checks.check_limits(board(), config())))
    assert finding.state == "warning"
    assert "cgroup_enable=memory" in str(finding.fix)


@pytest.mark.parametrize(("limit", "state"), [("max", "ok"), ("4000000000", "ok"), ("200000000", "problem")])
def test_limits_below_the_model_are_a_problem(
    board: Callable[..., Board], config: Callable[..., Config], limit: str, state: str
) -> None:
    cgroup = "sys__fs__cgroup__system.slice__edge-daemon.service__memory.high"
    limited = board(**{"sys__fs__cgroup__cgroup.controllers": "cpu memory pids", cgroup: limit})
    finding = only(list(board_checks.check_limits(limited, config(270_000_000))))
    assert finding.state == state


@pytest.mark.parametrize(("machine", "state"), [("armv7l", "problem"), ("aarch64", "ok"), ("x86_64", "ok")])
def test_litert_needs_a_64_bit_system(monkeypatch: pytest.MonkeyPatch, machine: str, state: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    finding = only(list(board_checks.check_system()))
    assert finding.state == state
    assert (finding.fix == "install the 64-bit edition of Raspberry Pi OS") == (state == "problem")


def test_a_missing_litert_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert only(list(board_checks.check_system())).fix == "python3 -m pip install ai-edge-litert"


def test_without_facts_of_the_kernel_a_check_is_unknown(
    board: Callable[..., Board], config: Callable[..., Config]
) -> None:
    assert only(list(board_checks.check_cpu(board(proc__cpuinfo=None)))).state == "unknown"
    bare = Board(board()._root / "nowhere")
    assert only(list(board_checks.check_memory(bare, config()))).state == "unknown"
    assert only(list(board_checks.check_limits(bare, config()))).state == "unknown"
    (config().bundle / "manifest.json").unlink()
    assert only(
        list(board_checks.check_memory(board(), replace(config(), bundle=Path("nowhere"))))
    ).state == ("unknown")


@pytest.mark.parametrize(
    ("disk", "state", "message"),
    [
        (None, "unknown", "can't be examined"),
        (Disk(10**9, True, "SD card"), "problem", "1000 MB free on SD card, read-only"),
        (Disk(10**8, False, None), "problem", "100 MB free on an unknown type of disk"),
    ],
)
def test_a_full_or_read_only_disk_is_a_problem(
    config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    disk: Disk | None,
    state: str,
    message: str,
) -> None:
    monkeypatch.setattr(Board, "disk", lambda _board, _path: disk)
    findings = list(board_checks.check_disk(Board(), config()))
    assert [finding.state for finding in findings] == [state, state]
    assert all(message in finding.message for finding in findings)


def test_a_tls_file_that_is_missing_is_a_problem(config: Callable[..., Config]) -> None:
    settings = config(lines='[mqtt]\ntls = true\nca_file = "nowhere.pem"\n')
    finding = only(list(link_checks.check_broker(settings)))
    assert finding.state == "problem"
    assert finding.fix == "correct ca_file, certificate_file or key_file in [mqtt]"


def test_a_missing_bundle_is_a_problem(config: Callable[..., Config]) -> None:
    finding = only(list(link_checks.check_bundle(replace(config(), bundle=Path("/nowhere/current")))))
    assert finding.state == "problem"
    assert str(finding.fix).startswith("sudo edge-daemon bundle install")


PI_5_ARGUMENTS = "reboot=w coherent_pool=1M numa_policy=interleave numa=fake=8 console=tty1 rootwait"


def pi_5(root: Path, nodes: str | None, arguments: str, bootloader: str | None) -> Board:
    """A Pi 5; `nodes` are its NUMA nodes, and `bootloader` is its configuration, None if it can't be read."""
    node = root / "sys/firmware/devicetree/base/reserved-memory/nvram@1"
    node.mkdir(parents=True)
    files = {
        "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "proc/cmdline": f"{arguments}\n",
        "sys/devices/system/node/online": nodes,
        "sys/firmware/devicetree/base/aliases/blconfig": "/reserved-memory/nvram@1\0",
        "sys/bus/nvmem/devices/rmem0/nvmem": "another device",
        "sys/bus/nvmem/devices/rmem1/nvmem": bootloader,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            (root / name).write_text(text)
    (root / "sys/bus/nvmem/devices/rmem1/of_node").symlink_to(node)
    return Board(root)


BOOTLOADER = "[all]\nBOOT_UART=1\nPOWER_OFF_ON_HALT=0\nBOOT_ORDER=0xf461\n"


@pytest.mark.parametrize(
    ("nodes", "arguments", "bootloader", "state", "message", "fix"),
    [
        ("0-7\n", PI_5_ARGUMENTS, BOOTLOADER, "ok", "8 NUMA nodes, interleaved", None),
        ("0-7\n", PI_5_ARGUMENTS, f"{BOOTLOADER}SDRAM_BANKLOW=1\n", "ok", "8 NUMA nodes", None),
        ("0-7\n", PI_5_ARGUMENTS, None, "ok", "8 NUMA nodes", None),
        (
            "0-1\n",
            PI_5_ARGUMENTS,
            f"{BOOTLOADER}SDRAM_BANKLOW=3\n",
            "warning",
            "=3 in the boot",
            "remove the",
        ),
        ("0,2-4\n", "numa=fake=4", BOOTLOADER, "warning", "4 NUMA nodes, but pages are not", "cmdline.txt"),
        (
            "0\n",
            PI_5_ARGUMENTS,
            BOOTLOADER,
            "warning",
            "expects NUMA, and this kernel has none",
            "SDRAM_BANKLOW=3",
        ),
        (None, "rootwait", f"{BOOTLOADER}SDRAM_BANKLOW=1\n", "warning", "up to 45% less", "apt full-upgrade"),
        (
            None,
            "rootwait",
            f"SDRAM_BANKLOW=1\nSDRAM_BANKLOW = 3\n{BOOTLOADER}",
            "ok",
            "SDRAM_BANKLOW=3",
            None,
        ),
        (
            None,
            "rootwait",
            f"{BOOTLOADER}[config.txt]\nSDRAM_BANKLOW=3\n",
            "warning",
            "older than",
            "rpi-eeprom-update",
        ),
        (
            "0\n",
            "numa=fake=8 numa=fake=1",
            BOOTLOADER,
            "warning",
            "numa=fake=1 on the kernel",
            "remove numa=fake=1",
        ),
        (None, "rootwait", None, "unknown", "only be read by root", "sudo edge-daemon doctor"),
    ],
)
def test_bank_layout_and_numa_of_a_pi_5_must_match(
    tmp_path: Path, nodes: str, arguments: str, bootloader: str, state: str, message: str, fix: str | None
) -> None:
    finding = only(list(check_sdram(pi_5(tmp_path, nodes, arguments, bootloader))))
    assert finding.state == state
    assert message in finding.message
    assert finding.fix is None if fix is None else fix in str(finding.fix)


def test_other_boards_have_no_bank_layout_to_check(board: Callable[..., Board]) -> None:
    assert list(check_sdram(board())) == []


@pytest.mark.parametrize(
    ("mode", "state"), [(0o600, "ok"), (0o640, "ok"), (0o644, "warning"), (0o602, "warning")]
)
@pytest.mark.parametrize("secret", ["mqtt password", "node.key"])
def test_secrets_that_every_user_can_read_are_reported(
    config: Callable[..., Config], tmp_path: Path, secret: str, mode: int, state: str
) -> None:
    for name in ("mqtt password", "node.key", "node.pem"):
        (tmp_path / name).write_text("x")
        (tmp_path / name).chmod(mode if name == secret else 0o600)
    settings = config(
        lines='[mqtt]\nusername = "u"\npassword_file = "mqtt password"\ntls = true\n'
        'certificate_file = "node.pem"\nkey_file = "node.key"\n'
    )
    findings = [
        each for each in link_checks.check_secrets(settings) if str(tmp_path / secret) in each.message
    ]
    assert only(findings).state == state
    if state == "warning":
        subprocess.run(str(only(findings).fix).removeprefix("sudo "), shell=True, check=True)
        assert all(each.state == "ok" for each in link_checks.check_secrets(settings))


def test_without_a_password_or_a_broker_there_is_no_secret(config: Callable[..., Config]) -> None:
    assert list(link_checks.check_secrets(config())) == []
    assert list(link_checks.check_secrets(config(lines='[[serial]]\nport = "/dev/ttyS0"\n'))) == []


@pytest.mark.parametrize(
    ("swaps", "behind", "state"),
    [
        ("", None, "ok"),
        ("/dev/zram0 partition 1 0 100\n", None, "ok"),
        ("/dev/zram0 partition 1 0 100\n", "none\n", "ok"),
        ("/dev/zram0 partition 1 0 100\n", "/dev/loop0\n", "warning"),  # Raspberry Pi OS trixie
        ("/var/swap file 1 0 -2\n", None, "warning"),
    ],
)
def test_swap_on_the_card_is_a_warning(
    board: Callable[..., Board], swaps: str, behind: str | None, state: str
) -> None:
    text = "Filename Type Size Used Priority\n" + swaps
    swapping = board(proc__swaps=text, sys__block__zram0__backing_dev=behind)
    assert only(list(board_checks.check_swap(swapping))).state == state


def test_free_space_is_checked_where_the_daemon_writes(config: Callable[..., Config], tmp_path: Path) -> None:
    findings = list(board_checks.check_disk(Board(), config()))
    assert [finding.state for finding in findings] == ["ok", "ok"]
    assert f"{tmp_path}/state: " in findings[0].message
    findings = list(board_checks.check_disk(Board(), config(weights=10**15)))
    assert [finding.state for finding in findings] == ["ok", "warning"]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "x.xnnpack").touch()
    assert [f.state for f in board_checks.check_disk(Board(), config(weights=10**15))] == ["ok", "ok"]


def test_an_sd_card_is_recognised_by_its_device(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    root = tmp_path / "root"
    link = root / "sys/dev/block" / f"{os.major(device)}:{os.minor(device)}"
    card = root / "sys/devices/platform/emmc2bus/mmc_host/mmc0/mmc0:aaaa/block/mmcblk0/mmcblk0p2"
    card.mkdir(parents=True)
    link.parent.mkdir(parents=True)
    link.symlink_to(card)
    disk = Board(root).disk(tmp_path / "not" / "there" / "yet")
    assert disk is not None
    assert (disk.kind, disk.read_only) == ("SD card", False)


def test_a_damaged_bundle_is_a_problem(config: Callable[..., Config]) -> None:
    assert only(list(link_checks.check_bundle(config()))).state == "ok"
    finding = only(list(link_checks.check_bundle(config(intact=False))))
    assert finding.state == "problem"
    assert "decoder.tflite" in finding.message


def test_a_missing_port_is_a_problem(board: Callable[..., Board], config: Callable[..., Config]) -> None:
    lines = '[[serial]]\nport = "/dev/ttyNOWHERE"\n'
    finding = only(list(link_checks.check_serial(board(), config(lines=lines))))
    assert (finding.state, finding.message.startswith("/dev/ttyNOWHERE does not exist")) == ("problem", True)


def test_a_file_that_is_not_a_port_is_a_problem(
    board: Callable[..., Board], config: Callable[..., Config], ptys: PtyPair
) -> None:
    lines = f'[[serial]]\nport = "{ptys.near}"\n'
    assert only(list(link_checks.check_serial(board(), config(lines=lines)))).state == "ok"
    plain = f'[[serial]]\nport = "{Path(__file__)}"\n'
    finding = only(list(link_checks.check_serial(board(), config(lines=plain))))
    assert "is not a serial port" in finding.message


def test_the_console_of_the_kernel_is_recognised(board: Callable[..., Board]) -> None:
    pi = board().consoles
    assert pi == ("serial0",)
    assert [link_checks.is_console(name, pi) for name in ("ttyAMA0", "ttyS0", "ttyUSB0")] == [
        True,
        True,
        False,
    ]
    other = board(proc__cmdline="console=ttyAMA2,115200 console=tty1").consoles
    assert [link_checks.is_console(name, other) for name in ("ttyAMA2", "ttyAMA0")] == [True, False]
    assert board(proc__cmdline="console=tty1 quiet").consoles == ()


def test_the_version_of_a_running_broker_is_reported(
    config: Callable[..., Config], mosquitto: Mosquitto
) -> None:
    finding = only(list(link_checks.check_broker(config(lines=f"[mqtt]\nport = {mosquitto.port}\n"))))
    assert (finding.state, finding.fix) == ("ok", None)
    assert "mosquitto version 2." in finding.message


def test_a_missing_broker_is_a_problem_with_a_fix(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_checks, "BROKER_WAIT_S", 1.0)
    port = free_port()
    finding = only(list(link_checks.check_broker(config(lines=f"[mqtt]\nport = {port}\n"))))
    assert finding.state == "problem"
    assert str(port) in finding.message
    assert finding.fix == "sudo apt install mosquitto"


def test_a_broker_that_refuses_the_login_has_another_fix(
    config: Callable[..., Config],
    start_mosquitto: Callable[..., Mosquitto],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_checks, "BROKER_WAIT_S", 2.0)
    strict = start_mosquitto("allow_anonymous false")
    finding = only(list(link_checks.check_broker(config(lines=f"[mqtt]\nport = {strict.port}\n"))))
    assert finding.state == "problem"
    assert "refuses" in finding.message
    assert "password_file" in str(finding.fix)


def test_all_checks_run_and_are_reported_as_text_and_json(
    board: Callable[..., Board], config: Callable[..., Config], mosquitto: Mosquitto
) -> None:
    findings = examine(config(lines=f"[mqtt]\nport = {mosquitto.port}\n"), board())
    assert {"system", "cpu", "power", "clock", "bundle", "memory", "limits", "swap", "disk", "broker"} == {
        finding.check for finding in findings
    }
    text = as_text(findings)
    assert "warning  limits   the memory controller is off" in text
    assert "fix: sudo sed -i" in text
    data = json.loads(as_json(findings))
    assert len(data["findings"]) == len(findings)
    assert data["problems"] == sum(finding.state == "problem" for finding in findings)


def test_the_directories_of_the_unit_are_checked(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config().path
    file.write_text('bundle = "bundle"\n[[serial]]\nport = "/dev/ttyNOWHERE"\n')
    for name in ("STATE_DIRECTORY", "CACHE_DIRECTORY"):
        monkeypatch.setenv(name, "restored when the test ends")
        monkeypatch.delenv(name)
    monkeypatch.setattr(cli, "CONFIG", str(file))
    output = CliRunner().invoke(cli.daemon, ["doctor", "--config", str(file), "--json"]).stdout
    disks = [each["said"] for each in json.loads(output)["findings"] if each["check"] == "disk"]
    assert [text.partition(":")[0] for text in disks] == ["/var/lib/edge-gemma", "/var/cache/edge-gemma"]


def test_without_permission_a_bundle_is_unknown_and_not_missing(
    config: Callable[..., Config],
) -> None:
    settings = config()
    settings.bundle.chmod(0)
    settings.cache_directory.mkdir(0)
    us = os.geteuid()
    if us == 0:
        os.seteuid(65_534)
    try:
        bundle = only(list(link_checks.check_bundle(settings)))
        disks = list(board_checks.check_disk(Board(), settings))
    finally:
        os.seteuid(us)
        settings.bundle.chmod(0o700)
    assert (bundle.state, bundle.fix) == ("unknown", "sudo edge-daemon doctor")
    assert [finding.state for finding in disks] == ["ok", "ok"]


def test_a_check_that_fails_does_not_hide_the_others(
    board: Callable[..., Board], config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_timestamp: float | None = None) -> time.struct_time:
        raise OSError("no clock")

    monkeypatch.setattr(time, "gmtime", broken)
    findings = examine(config(lines='[[serial]]\nport = "/dev/ttyNOWHERE"\n'), board())
    assert Finding("clock", "unknown", "could not be checked: no clock") in findings
    assert any(finding.check == "serial" for finding in findings)


def test_a_clock_at_the_epoch_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((1970, 1, 1, 0, 0, 0, 3, 1, 0)))
    assert only(list(board_checks.check_clock())).state == "problem"


def test_refused_and_failing_bundles_are_reported(config: Callable[..., Config], tmp_path: Path) -> None:
    assert list(link_checks.check_store(config())) == []
    store = BundleStore(tmp_path / "bundles" / "current")
    store.create()
    for name in ("old", "new"):
        (tmp_path / "bundles" / name).mkdir()
        store.activate(name)
    linked = replace(config(), bundle=store.link)
    assert only(list(link_checks.check_store(linked))).message == "new; fallback: old"
    record = DaemonRecord(store.directory)
    record.change(trouble="bundle newer is refused")
    assert only(list(link_checks.check_store(linked))).state == "warning"
    record.fail("new", "the daemon was killed or crashed")
    record.close()
    finding = only(list(link_checks.check_store(linked)))
    assert finding.message == "new failed 1 times in the last hour: the daemon was killed or crashed"
    assert finding.fix == "sudo edge-daemon bundle rollback"
