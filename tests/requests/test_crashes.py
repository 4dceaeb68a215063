"""Crashes are charged to clients, and a client with too many is suspended."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.requests.crashes import MAX_CRASHES, SUSPEND_AFTER, SUSPENDED_S, WITHIN_S
from edge.requests.journal import Journal
from tests.support.journal_files import REQUEST, crash


class Board:
    """A board whose clock and boot id the test sets."""

    def __init__(self, directory: Path) -> None:
        self.uptime, self.boot = 10.0, "first"
        self._directory = directory
        self._runs = 0
        self._path = directory / "journal.sqlite"

    def run(self) -> Journal:
        """Open the journal as a new run of the daemon would."""
        return Journal(self._path, boot=self.boot, uptime=lambda: self.uptime)

    def crash_on(self, client: str) -> None:
        """Simulate a run that crashes while it works on a new request of a client."""
        journal = self.run()
        key = f"{client} {self._runs}"
        journal.accept(key, REQUEST, "")
        journal.started(key)
        self._runs += 1
        self._path = crash(self._path, self._directory / str(self._runs))
        journal.close()
        again = self.run()  # answer the request that was in work, so that only its crash is recorded
        again.unfinished()
        again.answered(key, b"internal")
        again.close()

    def suspended_s(self, client: str) -> float:
        journal = self.run()
        journal.close()
        return journal.suspended_s(client)


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path)


def test_a_client_is_suspended_after_several_crashes_and_only_for_a_while(board: Board) -> None:
    for number in range(SUSPEND_AFTER):
        assert board.suspended_s("bad") == 0
        board.uptime += 60
        board.crash_on("bad")
        assert board.suspended_s("good") == 0, number
    assert board.suspended_s("bad") == SUSPENDED_S
    board.uptime += SUSPENDED_S / 2
    assert board.suspended_s("bad") == SUSPENDED_S / 2
    board.uptime += SUSPENDED_S / 2
    assert board.suspended_s("bad") == 0
    board.crash_on("bad")
    assert board.suspended_s("bad") == SUSPENDED_S


def test_crashes_far_apart_do_not_suspend_a_client(board: Board) -> None:
    for _ in range(2 * SUSPEND_AFTER):
        board.crash_on("client")
        board.uptime += WITHIN_S / (SUSPEND_AFTER - 1)
        assert board.suspended_s("client") == 0


def test_a_restart_of_the_board_resets_the_count(board: Board) -> None:
    for _ in range(SUSPEND_AFTER):
        board.crash_on("client")
    board.boot, board.uptime = "second", 5.0
    assert board.suspended_s("client") == 0


def test_only_the_first_run_after_a_crash_reports_a_request_in_work(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    journal = Journal(path)
    journal.accept("client a", REQUEST, "")
    journal.started("client a")
    left = crash(path, tmp_path / "left")
    journal.close()
    for expected in (True, False):
        journal = Journal(left)
        assert journal.crashed_in_work is expected
        journal.close()


def test_a_clean_stop_with_a_request_in_work_is_not_a_crash(board: Board) -> None:
    for _ in range(SUSPEND_AFTER):
        journal = board.run()
        journal.accept("client a", REQUEST, "")
        journal.started("client a")
        journal.close()
    assert board.suspended_s("client") == 0


def test_a_crash_is_charged_once_and_not_to_waiting_requests(board: Board) -> None:
    board.crash_on("client")
    journal = board.run()
    journal.accept("waiting a", REQUEST, "")
    for _ in range(SUSPEND_AFTER):
        journal.close()
        journal = board.run()
    journal.close()
    assert board.suspended_s("client") == board.suspended_s("waiting") == 0


def test_the_number_of_recorded_crashes_is_bounded(board: Board) -> None:
    for number in range(MAX_CRASHES + 5):
        board.crash_on(f"client{number}")
    journal = board.run()
    assert journal._store.run(lambda db: db.execute("SELECT count(*) FROM crashes").fetchone()) == (
        MAX_CRASHES,
    )
    journal.close()
