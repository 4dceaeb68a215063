"""A quarter of an hour of `soak.py`, and what its statistics can tell."""

import random
import subprocess
from pathlib import Path

import pytest

from tests.support.soak import Interval, Soak, described, slope

ROOT = Path(__file__).parents[2]
MINUTES = [number / 60 for number in range(10, 50)]


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "idle_s"), [(20, 3), (900, 30)], ids=["short", "long"])
def test_a_daemon_under_light_load_answers_everything_once_and_holds_no_more_with_time(
    tmp_path: Path, seconds: int, idle_s: int
) -> None:
    summary = Soak(tmp_path, seconds, idle_s).run()
    print("\n" + described(summary))
    assert summary.problems() == []
    assert len({outcome.split(":")[0] for outcome in summary.outcomes}) >= 3
    assert summary.slope_mb_h is not None or seconds < 900


def test_make_can_start_the_soak() -> None:
    said = subprocess.run(["make", "--dry-run", "soak"], cwd=ROOT, check=True, capture_output=True, text=True)
    [command] = [line for line in said.stdout.splitlines() if "tests.support.soak" in line]
    shown = subprocess.run(
        f"{command} --help", shell=True, cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "--hours" in shown.stdout


@pytest.mark.parametrize(("grows", "noise"), [(0.0, 0.3), (4.0, 0.3), (4.0, 0.0), (0.0, 0.0)])
def test_a_slope_lies_between_its_bounds(grows: float, noise: float) -> None:
    chance = random.Random(7)
    found = slope(MINUTES, [90 + grows * at + noise * chance.random() for at in MINUTES])
    assert found.low <= grows + 1e-9
    assert grows - 1e-9 <= found.high
    assert found.high - found.low < 1


def test_a_few_outliers_do_not_bend_a_slope() -> None:
    values = [90.0 + 20.0 * (number % 5 == 0) for number in range(len(MINUTES))]
    assert slope(MINUTES, values) == Interval(0, 0, 0)
