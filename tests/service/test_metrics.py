"""The metrics file: Prometheus's parser and other users can read it; disk errors don't stop the daemon."""

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from edge.service.metrics import MODE, MetricsFile, as_text
from tests.support import bundles
from tests.support.counterparts import DaemonProcess, Mosquitto, edge_command, wait_for

STATUS = {"version": "1", "model": "gemma3", "bundle": 'a"b\\c\n'}
HEALTH = {
    "queue": 2,
    "working": True,
    "answered": 12,
    "failed": 1,
    "tokens_per_s": 11.5,
    "first_token_ms": 840,
    "memory_mib": 100,
    "temperature_c": 61,
    "throttling": ["throttled"],
    "last_error": "busy: x",
    "journal": None,
    "journal_damage": 3,
}
UNKNOWN = dict.fromkeys(("tokens_per_s", "first_token_ms", "memory_mib", "temperature_c", "throttling"))


def samples(text: str) -> dict[str, float]:
    """Values by name and by the labels other than the node's."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            assert sample.labels["node"] == "pump"
            labels = [text for label, text in sample.labels.items() if label != "node"]
            found[" ".join([sample.name.removeprefix("edge_gemma_"), *labels])] = sample.value
    return found


def test_health_is_written_in_base_units() -> None:
    assert samples(as_text("pump", STATUS, HEALTH).decode()) == {
        'info a"b\\c\n gemma3 1': 1.0,
        "queued_requests": 2.0,
        "working": 1.0,
        "answers_total": 12.0,
        "errors_total": 1.0,
        "tokens_per_second": 11.5,
        "first_token_seconds": 0.84,
        "anonymous_memory_bytes": 100 * 2**20,
        "temperature_celsius": 61.0,
        "throttled under-voltage": 0.0,
        "throttled frequency capped": 0.0,
        "throttled throttled": 1.0,
        "throttled soft temperature limit": 0.0,
        "journal_on_disk": 1.0,
        "journal_damage_total": 3.0,
    }


def test_unknown_values_are_left_out() -> None:
    found = samples(as_text("pump", STATUS, HEALTH | UNKNOWN | {"journal": "disk full"}).decode())
    assert found["journal_on_disk"] == 0
    assert len(found) == 7


def test_a_failing_disk_is_logged_once_and_does_not_stop_the_daemon(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.service.metrics.EVERY_S", 0.0)
    file = MetricsFile(tmp_path / "there" / "edge.prom", "pump", lambda: STATUS, lambda: HEALTH)
    for _ in range(3):
        file.update()
    assert caplog.text.count("edge.prom: metrics can't be written: No such file or directory") == 1
    file.remove()
    (tmp_path / "there").mkdir()
    file.update()
    assert os.listdir(tmp_path / "there") == ["edge.prom"]


@pytest.fixture
def daemon(tmp_path: Path, mosquitto: Mosquitto) -> Iterator[DaemonProcess]:
    bundle = bundles.small_bundle("gemma4-two-kv-heads", "int8", context=2048)
    config = f'metrics_file = "edge.prom"\nlog_payloads = true\n[mqtt]\nport = {mosquitto.port}\n'
    daemon = DaemonProcess(tmp_path, bundle, config)
    yield daemon
    daemon.close()


def test_a_running_daemon_writes_metrics_and_logs_payloads_if_configured(
    daemon: DaemonProcess, mosquitto: Mosquitto, tmp_path: Path
) -> None:
    path = tmp_path / "edge.prom"
    before = os.umask(0o077)
    daemon.start()
    os.umask(before)
    wait_for(path.exists)
    assert stat.S_IMODE(path.stat().st_mode) == MODE
    assert samples(path.read_text())["answers_total"] == 0
    ask = edge_command("ask", "--port", str(mosquitto.port), "--max-tokens", "3", "--node", "pump", "Secret?")
    subprocess.run(ask, check=True)
    assert daemon.stop() == 0
    assert not path.exists()
    log = daemon.log.read_text()
    assert " INFO answered id=" in log
    assert " finish=length prompt=" in log
    assert ' request={"id":' in log
    assert "Secret?" in log
    assert ' answer={"type":"final"' in log
