"""While a model is compiled, messages of the native library are captured, and no others."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys

import pytest

from edge.runtime.native_messages import native_messages

LIBC = ctypes.CDLL(None)


def c_stderr(text: str) -> None:
    LIBC.fputs(text.encode(), ctypes.c_void_p.in_dll(LIBC, "stderr"))


def test_errors_are_captured_infos_dropped_and_the_rest_logged_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with native_messages() as errors:
        c_stderr("INFO: Created TensorFlow Lite XNNPACK delegate for CPU.\n")
        c_stderr("WARNING: look here\n")
        assert caplog.messages == ["LiteRT: WARNING: look here"]
        c_stderr("ERROR: first\nERROR: second\n")
        assert errors == ["first", "second"]
    with native_messages() as errors:
        assert errors == []
    assert caplog.record_tuples == [
        ("edge.runtime.native_messages", logging.WARNING, "LiteRT: WARNING: look here")
    ]


def test_output_of_python_threads_during_capture_appears_at_once() -> None:
    program = """
import os, sys, threading
from edge.runtime.native_messages import native_messages
def other():
    print("from a thread", file=sys.stderr, flush=True)
    os.write(2, b"to the descriptor\\n")
with native_messages():
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr.splitlines() == ["from a thread", "to the descriptor"]


def test_standard_error_is_restored_after_the_capture(capfd: pytest.CaptureFixture[str]) -> None:
    with native_messages():
        pass
    c_stderr("again\n")
    LIBC.fflush(None)
    os.write(2, b"and again\n")
    assert capfd.readouterr().err == "again\nand again\n"


def test_an_endless_message_is_bounded() -> None:
    with native_messages() as errors:
        for number in range(1000):
            c_stderr(f"ERROR: {number}\n")
    assert len(errors) <= 20
