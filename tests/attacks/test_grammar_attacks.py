"""Formats generated to explode: none takes more than its limits, none harms a neighbour."""

from __future__ import annotations

import contextlib
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge.errors import RequestError
from edge.generation.grammar_channel import MEMORY_BYTES, REQUEST_S, STACK_BYTES, STEP_S
from edge.generation.grammar_client import GrammarWorker
from edge.generation.sampling import Sampling
from edge.protocol.messages import MAX_REQUEST_BYTES, Final, parse_request
from tests.attacks.test_hostile_clients import HostileClient, Neighbour, asking, formed
from tests.conftest import Field
from tests.generation.test_grammar import STOPS, format_of
from tests.generation.test_grammar_worker import DIGEST, MODEL, answer_of, answers
from tests.support import bundles
from tests.support.checkpoint_files import real_model
from tests.support.counterparts import DaemonProcess, Mosquitto

CAP = 400 * 1024 * 1024
TOKENS = 8
SLACK_BYTES = 8 * 1024 * 1024  # the pages of the vocabulary's view that a child has copied, and its replies
SLACK_S = 0.3  # between two ticks of the kernel's clock; replies
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SAMPLE_S = 0.01

Random = random.Random


def _count(r: Random) -> int:
    return int(10 ** r.uniform(0.5, 9))


def _pattern(r: Random, depth: int = 0) -> str:
    """Return a pattern of what regular expression engines find hard."""
    letter, count = r.choice(LETTERS), min(_count(r), 10**5)
    inner = _pattern(r, depth + 1) if depth < 3 else letter
    return r.choice(
        [
            f".*{letter}.{{{count}}}{inner}",
            f"({inner}|{letter}?)+" * r.randint(1, 60),
            f"(({inner}){{1,{count}}}){{{r.randint(1, 500)}}}",
            f"{letter}{{{_count(r)}}}",
            rf"\p{{L}}{{1,{r.randint(1, 2000)}}}\P{{Lu}}{{{r.randint(1, 2000)}}}{inner}",
            rf"[^{letter}]*({inner}|\w+)*[^\d]{{{r.randint(0, 300)},}}",
            "|".join(f"({r.choice(LETTERS)}*{r.choice(LETTERS)}.*{n})" for n in range(r.randint(2, 200))),
        ]
    )


def _intersection(r: Random) -> Any:
    patterns = [f"[a-z]*{letter}[a-z]*" for letter in r.sample(LETTERS, r.randint(2, 26))]
    patterns += [_pattern(r) for _ in range(r.randint(0, 3))]
    return {"type": "string", "allOf": [{"pattern": pattern} for pattern in patterns]}


def _multiples(r: Random) -> Any:
    factors = r.sample([7, 11, 13, 17, 97, 101, 99_991, 49_999, 9_999_991, 0.007, 1e-9], r.randint(1, 4))
    return {"allOf": [{"type": r.choice(["number", "integer"]), "multipleOf": factor} for factor in factors]}


def _long_texts(r: Random) -> Any:
    text = r.choice(LETTERS) * min(_count(r), 200_000)
    return r.choice([{"const": text}, {"enum": [text[: len(text) // 9] + str(n) for n in range(9)]}])


def _names(r: Random) -> Any:
    names = [_pattern(r) for _ in range(r.randint(1, 40))]
    return {"type": "object", "patternProperties": {name: {"type": "string"} for name in names}}


def _members(r: Random) -> Any:
    names = [f"{n}{r.choice(LETTERS) * r.randint(0, 200)}" for n in range(r.randint(10, 900))]
    return {"type": "object", "properties": {name: {"pattern": _pattern(r, 2)} for name in names}}


def _lists(r: Random) -> Any:
    return {"type": "array", "items": _schema(r), "minItems": _count(r), "maxItems": 10**9 + _count(r)}


def _alternatives(r: Random) -> Any:
    required = [{"required": [letter]} for letter in r.sample(LETTERS, r.randint(2, 9))]
    return {r.choice(["allOf", "anyOf", "oneOf"]): [{"anyOf": required}, _schema(r)] * r.randint(1, 40)}


def _references(r: Random) -> Any:
    count, key = r.randint(1, 1100), r.choice(["items", "additionalProperties", "anyOf"])
    chain: dict[str, Any] = {}
    for number in range(count):
        reference = {"$ref": f"#/$defs/a{(number + 1) % count if r.random() < 0.01 else number + 1}"}
        chain[f"a{number}"] = {key: [reference, reference] if key == "anyOf" else reference}
    return {"$defs": chain | {f"a{count}": {"type": "string"}}, "$ref": "#/$defs/a0"}


def _lengths(r: Random) -> Any:
    return {"type": "string", "minLength": _count(r), "pattern": _pattern(r)}


SCHEMAS: tuple[Callable[[Random], Any], ...] = (
    *(_intersection, _multiples, _long_texts, _names, _members),
    *(_lists, _alternatives, _references, _lengths, lambda r: {"pattern": _pattern(r)}),
)


def _schema(r: Random) -> Any:
    return r.choice(SCHEMAS)(r)


def request(seed: int) -> bytes:
    """Return a request, at most as large as a daemon takes, whose format explodes in some way."""
    return next(payload for payload in _requests(seed) if len(payload) <= MAX_REQUEST_BYTES)


def _requests(seed: int) -> Iterator[bytes]:
    r = Random(seed)
    while True:
        match seed % 5:
            case 0:
                yield asking(response_format={"type": "regex", "regex": _pattern(r)}, max_tokens=TOKENS)
            case 1:
                texts = sorted({_pattern(r)[:50_000] for _ in range(r.randint(1, 4))})
                yield asking(response_format={"type": "choice", "choice": texts}, max_tokens=TOKENS)
            case 2:
                parameters = {"type": "object", "properties": {"x": _schema(r)}, "required": ["x"]}
                tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
                yield asking(tools=[tool], max_tokens=TOKENS)
            case _:
                yield formed(SCHEMAS[seed // 5 % len(SCHEMAS)](r))


class Watch(threading.Thread):
    """Samples the grammar worker of a daemon: memory beyond the view of the vocabulary, processor time."""

    def __init__(self, daemon: DaemonProcess) -> None:
        super().__init__()
        self.peak = self.total = 0
        self.stopping = threading.Event()
        self._daemon = daemon

    def run(self) -> None:
        while not self.stopping.wait(SAMPLE_S):
            with contextlib.suppress(OSError, ValueError, StopIteration):
                worker, child = self.processes()
                shared = _anonymous(worker)
                grown = _anonymous(child) - shared
                self.peak = max(self.peak, grown)
                self.total = max(self.total, self._daemon.memory() + shared + max(grown, 0))

    def processes(self) -> tuple[int, int]:
        """Return the worker and its child. Raises ValueError if there are none."""
        assert self._daemon.process is not None
        (worker,) = _children(self._daemon.process.pid)
        (child,) = _children(worker)
        return worker, child

    def used_s(self) -> dict[int, float]:
        """Return the processor time of the child that there is, if there is one."""
        with contextlib.suppress(OSError, ValueError):
            child = self.processes()[1]
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            return {child: (int(fields[11]) + int(fields[12])) / 100}
        return {}


def _children(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def _anonymous(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


def attack(daemon: DaemonProcess, broker: Mosquitto, seeds: range) -> None:
    """Send the requests of `seeds` while a neighbour asks; check answers, memory and processor time."""
    hostile, neighbour, watch = HostileClient(broker), Neighbour(broker), Watch(daemon)
    outcomes: Counter[str] = Counter()
    neighbour.start()
    neighbour.goes_on()
    watch.start()
    try:
        for seed in seeds:
            before = watch.used_s()
            hostile.send(json.dumps(json.loads(request(seed)) | {"id": f"a{seed}"}).encode())
            answer = hostile.last_answer()
            assert answer["type"] == "final" or answer["code"] == "bad_request", (seed, answer)
            outcomes[str(answer.get("message", "final")).rpartition("complex: ")[2][:40]] += 1
            for child, used_s in watch.used_s().items():
                if (
                    child in before
                ):  # it was not ended, so it took what a request may take, and the neighbour's
                    assert used_s - before[child] < REQUEST_S + (TOKENS + 3) * STEP_S + SLACK_S, seed
        neighbour.goes_on()
    finally:
        neighbour.stopping.set()
        watch.stopping.set()
        neighbour.join()
        watch.join()
        hostile.close()
    assert [answer for answer in neighbour.answers if not isinstance(answer, Final)] == []
    print(f"{len(neighbour.answers)} answers to the neighbour, the slowest after {neighbour.slowest_s:.2f} s")
    print(f"a request took at most {watch.peak / 2**20:.0f} MiB, all together {watch.total / 2**20:.0f} MiB")
    print("\n".join(f"{count:4} {outcome}" for outcome, count in outcomes.most_common(12)))
    assert watch.peak < MEMORY_BYTES + STACK_BYTES + SLACK_BYTES
    assert watch.total < CAP
    assert "Traceback" not in daemon.log.read_text()
    assert daemon.process is not None
    assert daemon.process.poll() is None


def test_tool_declarations_that_explode_leave_the_worker_usable(tmp_path: Path) -> None:
    worker = GrammarWorker(MODEL, DIGEST, tmp_path, STOPS)
    outcomes: Counter[str] = Counter()
    for seed in range(2, 62, 5):
        answer_format = format_of(parse_request(request(seed)))
        try:
            answer_of(worker.constrain(answer_format, TOKENS, lambda: None), Sampling(), seed, TOKENS)
            outcomes["followed"] += 1
        except RequestError as error:
            outcomes[error.code] += 1
        assert answers(worker)
    worker.close()
    print(dict(outcomes))
    assert set(outcomes) == {"followed", "bad_request"}


def test_formats_that_explode_take_no_more_than_their_limits(served: Field) -> None:
    attack(served.daemon, served.mosquitto, range(15))


@pytest.fixture
def real(tmp_path: Path) -> Iterator[tuple[DaemonProcess, Mosquitto]]:
    """The real 270M, with no more than CAP of data in any of its processes."""
    broker = Mosquitto(tmp_path, ("allow_anonymous true",))
    bundle = bundles.bundle_directory(real_model(), "int4", 2048)
    daemon = DaemonProcess(tmp_path, bundle, f"queue = 4\n[mqtt]\nport = {broker.port}\n")
    daemon.within = ("prlimit", f"--data={CAP}")
    broker.start()
    daemon.start()
    broker.retained("edge/v1/pump/status")
    yield daemon, broker
    assert daemon.stop() == 0
    daemon.close()
    broker.stop()


@pytest.mark.slow
def test_two_hundred_formats_that_explode_with_the_real_model(real: tuple[DaemonProcess, Mosquitto]) -> None:
    daemon, broker = real
    attack(daemon, broker, range(200))
