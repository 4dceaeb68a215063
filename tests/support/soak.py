"""A daemon under light, mixed load for hours: no resource may grow, and each request gets one answer.

`python -m tests.support.soak --hours 24` runs for that time and prints a summary; `test_soak.py` runs
a quarter of an hour of the same. Broker, daemon and serial line are real, the model is small and random.
"""

import contextlib
import itertools
import json
import math
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import click

from edge.client.link import Link
from edge.client.links import MqttLink, SerialLink
from edge.endpoints import SerialConfig
from tests.support import bundles
from tests.support.checkpoint_files import copy_fixture
from tests.support.counterparts import DaemonProcess, Mosquitto, PtyPair, wait_for
from tests.support.soak_clients import CONTEXT, Sensors, SoakClient, Subscriber, Worker

READING_S = 1.0  # between two readings of a sensor
SAMPLE_S = 1.0
WARM_UP_S = 1200.0  # at most
WARM_UP_SHARE = 0.65  # of the run, at most: caches are full after about 500 s of the haste
WINDOWS, WINDOW_S = 40, 15.0  # after the warm-up: so many, but none shorter
FEWEST_WINDOWS = 10  # for a slope
CONFIDENCE = 1.96  # standard deviations: 95%
SLOPE_MB_H = 1.0  # the most that anonymous memory may grow, in MB an hour
STATE_MB, CACHE_MB = 16, 300  # the most that the directories may hold
MB = 1e6

CONFIG = """queue = 8
[mqtt]
port = {port}
[[serial]]
port = "{serial}"
[[route]]
name = "pumps"
topics = ["sensors/+/pressure"]
event_topic = "alarms/{{sensor}}"
answer_topic = "explanations/{{sensor}}"
trigger = {{ when = "last > `8`", clear = "last < `6`", min_interval_s = 0 }}
[route.ask]
instructions = "You watch the pumps of a waterworks. Say in one sentence what the likely cause is."
question = "Pump {{sensor}}, {{reason}}: {{statistics}}. Latest readings: {{readings}}."
max_tokens = 30
schema = {{ type = "object", properties = {{ urgent = {{ type = "boolean" }} }}, required = ["urgent"] }}
"""


class Interval(NamedTuple):
    """An estimate and the bounds that it lies between with 95% confidence."""

    estimate: float
    low: float
    high: float


def slope(times: Sequence[float], values: Sequence[float]) -> Interval:
    """Theil's and Sen's: the median of the slopes between all pairs; Kendall's variance gives the bounds.

    Neither asks for normal errors, and a third of the values may be outliers.
    """
    slopes = sorted(
        (b - a) / (t - s) for (s, a), (t, b) in itertools.combinations(zip(times, values, strict=True), 2)
    )
    count, pairs = len(times), len(slopes)
    spread = CONFIDENCE * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    low, high = int((pairs - spread) / 2), math.ceil((pairs + spread) / 2)
    middle = (slopes[(pairs - 1) // 2] + slopes[pairs // 2]) / 2
    return Interval(middle, slopes[max(low, 0)], slopes[min(high, pairs - 1)])


@dataclass(frozen=True)
class Sample:
    """What a process holds at a time (monotonic seconds); memory, files and writes in bytes."""

    at: float
    memory: int
    descriptors: int
    threads: int
    written: int
    state: int
    cache: int


@dataclass
class Summary:
    """What a soak has seen. `wrong` lists answers that no request should get.

    An `mb` is 10^6 bytes; `written_kb` is a request's share of what was written to the disk.
    """

    hours: float
    outcomes: dict[str, int]
    events: int
    explanations: int
    wrong: list[str]
    copies: int
    memory_mb: tuple[float, float]
    slope_mb_h: Interval | None
    descriptors: list[int]
    threads: list[int]
    state_mb: float
    cache_mb: float
    written_mb_h: float
    written_kb: float
    processor_share: float
    idle_wakeups_s: float

    def problems(self) -> list[str]:
        """Return the requirements that were not met."""
        found = list(self.wrong)
        if self.slope_mb_h is not None and self.slope_mb_h.low > SLOPE_MB_H:
            found.append(f"memory grows by {self.slope_mb_h.estimate:.2f} MB/h")
        if self.events != self.explanations:
            found.append(f"{self.events} events, {self.explanations} explanations")
        for name in ("descriptors", "threads"):
            if len(set(getattr(self, name))) > 1:
                found.append(f"{name} are not constant: {getattr(self, name)}")
        for name, most in (("state_mb", STATE_MB), ("cache_mb", CACHE_MB)):
            if getattr(self, name) > most:
                found.append(f"{name} is {getattr(self, name):.1f}, at most {most} is allowed")
        return found + [f"{self.copies} answers came twice"] * bool(self.copies)


class Soak:
    """A broker, a daemon, two ports wired to each other, and clients; all files are in `directory`."""

    def __init__(self, directory: Path, seconds: float, idle_s: float) -> None:
        self._directory, self._seconds, self._idle_s = directory, seconds, idle_s
        self._warm_up_s = min(WARM_UP_S, WARM_UP_SHARE * seconds)
        self._chance = random.Random(1)

    def run(self, progress: Callable[[float, Sample], None] = lambda _share, _sample: None) -> Summary:
        """Run; `progress` gets the completed share and the latest sample about once a second."""
        with contextlib.ExitStack() as stack:
            broker = Mosquitto(self._directory, ("allow_anonymous true",))
            broker.start()
            stack.callback(broker.stop)
            ptys = PtyPair(self._directory / "near", self._directory / "far")
            ptys.plug()
            stack.callback(ptys.unplug)
            bundle = _bundle(self._directory / "model")
            config = CONFIG.format(port=broker.port, serial=ptys.near)
            self._daemon = DaemonProcess(self._directory, bundle, config)
            stack.callback(self._daemon.close)
            self._daemon.start()
            broker.retained("edge/v1/pump/status")
            subscriber = Subscriber(broker)
            stack.callback(subscriber.close)
            line = SerialConfig(str(ptys.far), 115_200, "none", lenient=False)
            opens: dict[str, Callable[[], Link]] = {
                "m": lambda: MqttLink(broker.broker, "pump"),
                "n": lambda: MqttLink(broker.broker, "pump"),
                "s": lambda: SerialLink(line),
            }
            warm = time.monotonic() + self._warm_up_s
            clients = [SoakClient(name, way, random.Random(name), warm) for name, way in opens.items()]
            samples = self._load(clients, subscriber, progress)
            summary = self._summary(clients, subscriber, samples)
            assert self._daemon.stop() == 0
        assert "Traceback" not in self._daemon.log.read_text()
        return summary

    def _load(
        self, clients: Sequence[SoakClient], subscriber: Subscriber, progress: Callable[[float, Sample], None]
    ) -> list[Sample]:
        """Run all clients for the duration, and until every request is answered."""
        sensors = Sensors(subscriber, self._chance)
        workers = [Worker(client.ask, client.pause_s) for client in clients]
        workers.append(Worker(sensors.read, lambda: READING_S))
        for worker in workers:
            worker.start()
        samples = [self._sample()]
        began = samples[0].at
        while samples[-1].at - began < self._seconds:
            self._daemon.next_notice()
            if time.monotonic() - samples[-1].at >= SAMPLE_S:
                samples.append(self._sample())
                progress((samples[-1].at - began) / self._seconds, samples[-1])
            for worker in workers:
                assert worker.is_alive(), "a client has failed"
        for worker in workers:
            worker.stop()
        with contextlib.suppress(AssertionError):  # the summary says how many are missing
            wait_for(lambda: len(subscriber.explanations) >= subscriber.events)
        return samples

    def _summary(
        self, clients: Sequence[SoakClient], subscriber: Subscriber, samples: list[Sample]
    ) -> Summary:
        first, last = samples[0], samples[-1]
        processor_s = self._processor_s()
        quiet = minima(samples, self._warm_up_s)
        growth = None
        if len(quiet) >= FEWEST_WINDOWS:
            growth = slope([each.at / 3600 for each in quiet], [each.memory / MB for each in quiet])
        return Summary(
            hours=(last.at - first.at) / 3600,
            outcomes=dict(sorted(sum((client.outcomes for client in clients), Counter()).items())),
            events=subscriber.events,
            explanations=len(subscriber.explanations),
            wrong=[wrong for client in clients for wrong in client.wrong],
            copies=sum(
                count - 1 for count in [*subscriber.answers.values(), *subscriber.explanations.values()]
            ),
            memory_mb=(first.memory / MB, last.memory / MB),
            slope_mb_h=growth,
            descriptors=sorted({each.descriptors for each in quiet}),
            threads=sorted({each.threads for each in quiet}),
            state_mb=max(sample.state for sample in samples) / MB,
            cache_mb=max(sample.cache for sample in samples) / MB,
            written_kb=(last.written - first.written)
            / 1000
            / (subscriber.events + sum(a.asked for a in clients)),
            written_mb_h=(last.written - first.written) / MB / (last.at - first.at) * 3600,
            processor_share=processor_s / (last.at - first.at),
            idle_wakeups_s=self._idle_wakeups_s(),
        )

    @property
    def _proc(self) -> Path:
        assert self._daemon.process is not None
        return Path(f"/proc/{self._daemon.process.pid}")

    def _sample(self) -> Sample:
        status = _fields(self._proc / "status")
        return Sample(
            time.monotonic(),
            1024 * status["RssAnon"],
            len(os.listdir(self._proc / "fd")),
            status["Threads"],
            _fields(self._proc / "io")["write_bytes"],
            _size(self._directory / "state"),
            _size(self._directory / "cache"),
        )

    def _processor_s(self) -> float:
        """Processor time that the daemon has had, in seconds."""
        fields = (self._proc / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _idle_wakeups_s(self) -> float:
        """How often the daemon's threads wake up per second without requests."""
        before, until = self._switches(), time.monotonic() + self._idle_s
        while time.monotonic() < until:
            self._daemon.next_notice()
        return (self._switches() - before) / self._idle_s

    def _switches(self) -> int:
        return sum(
            _fields(task / "status")["voluntary_ctxt_switches"] for task in (self._proc / "task").iterdir()
        )


def _bundle(folder: Path) -> Path:
    """A small bundle that knows turns."""
    copy_fixture("gemma4-two-kv-heads", folder)
    (folder / "chat_template.jinja").write_text("<|turn>")
    return bundles.bundle_directory(folder, "int8", context=CONTEXT)


def minima(samples: Sequence[Sample], warm_up_s: float) -> list[Sample]:
    """Give, of each window after the warm-up, the least of everything: what is held between requests."""
    begins = samples[0].at + warm_up_s
    length = max(WINDOW_S, (samples[-1].at - begins) / WINDOWS)
    windows: dict[int, list[Sample]] = {}
    for sample in samples:
        if sample.at >= begins:
            windows.setdefault(int((sample.at - begins) / length), []).append(sample)
    return [
        Sample(
            begins + (number + 0.5) * length,
            *(min(getattr(sample, each.name) for sample in window) for each in fields(Sample)[1:]),
        )
        for number, window in windows.items()
    ]


def _fields(file: Path) -> dict[str, int]:
    """Read the numbers of a file in /proc."""
    pairs = (line.split() for line in file.read_text().splitlines())
    return {pair[0].rstrip(":"): int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdigit()}


def _size(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def described(summary: Summary) -> str:
    """Give a summary for people."""
    growth = summary.slope_mb_h
    rows = {
        "hours": f"{summary.hours:.2f}",
        "requests": ", ".join(f"{kind} {count}" for kind, count in summary.outcomes.items()),
        "events, explanations": f"{summary.events}, {summary.explanations}",
        "anonymous memory": f"{summary.memory_mb[0]:.1f} MB at first, {summary.memory_mb[1]:.1f} at last",
        "its slope": "too short to tell"
        if growth is None
        else f"{growth.estimate:+.2f} MB/h (95%: {growth.low:+.2f} to {growth.high:+.2f})",
        "descriptors, threads": f"{summary.descriptors}, {summary.threads}",
        "state, cache": f"at most {summary.state_mb:.1f} MB, {summary.cache_mb:.1f} MB",
        "written": f"{summary.written_mb_h:.0f} MB/h, {summary.written_kb:.0f} kB a request",
        "processor": f"{summary.processor_share:.1%} of one core",
        "idle": f"{summary.idle_wakeups_s:.1f} wake-ups a second",
    }
    return "\n".join(f"{name:>21}: {said}" for name, said in rows.items())


@click.command()
@click.option("--hours", type=float, default=24.0, show_default=True, help="How long to soak.")
@click.option("--json", "as_json", is_flag=True, help="Print what was seen as JSON.")
def main(hours: float, as_json: bool) -> None:
    """Run a daemon under light load for some hours and print a summary."""

    def progress(share: float, sample: Sample) -> None:
        if sys.stderr.isatty():
            said = f"{share:6.1%}  {sample.memory / MB:.1f} MB, {sample.descriptors} descriptors"
            click.echo(f"\r{said} ", nl=False, err=True)

    with tempfile.TemporaryDirectory(prefix="edge-gemma-soak-") as directory:
        summary = Soak(Path(directory), hours * 3600, idle_s=30.0).run(progress)
    if sys.stderr.isatty():
        click.echo(err=True)
    problems = summary.problems()
    click.echo(json.dumps(asdict(summary) | {"problems": problems}) if as_json else described(summary))
    if problems:
        raise click.ClickException("; ".join(problems))


if __name__ == "__main__":
    main()
