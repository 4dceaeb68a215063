"""Reading untrusted files; damage to a stamp causes neither a match nor an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.files import matches, open_regular, read_regular, write_stamp


@pytest.mark.parametrize("what", ["fifo", "device", "directory"])
def test_a_path_that_is_not_a_regular_file_is_refused_at_once(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x"
    if what == "fifo":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(path)


def test_a_file_is_read_up_to_its_limit_and_refused_above_it(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_regular(path, 4)


@settings(max_examples=30)
@given(content=st.text(), damaged=st.binary())
def test_a_stamp_matches_only_its_written_content(
    tmp_path_factory: pytest.TempPathFactory, content: str, damaged: bytes
) -> None:
    content = content.encode(errors="replace").decode()
    stamp = tmp_path_factory.getbasetemp() / "stamp"
    write_stamp(stamp, content)
    assert matches(stamp, content)
    stamp.write_bytes(damaged)
    assert matches(stamp, content) == (damaged == content.encode())
    stamp.write_bytes(content.encode() + b"\n")
    assert not matches(stamp, content)


def test_a_stamp_on_a_read_only_disk_is_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    write_stamp(tmp_path / "file" / "stamp", "x")
    assert not matches(tmp_path / "file" / "stamp", "x")


def test_a_private_process_creates_files_for_its_user_only(tmp_path: Path) -> None:
    program = f"""
import os
from pathlib import Path
from edge.files import keep_private
os.umask(0o022)
keep_private()
Path({str(tmp_path)!r}, "file").touch()
Path({str(tmp_path)!r}, "directory").mkdir()
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "directory").stat().st_mode & 0o777 == 0o700
