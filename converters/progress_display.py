"""Progress on standard error: one line that is rewritten on a terminal, a line for each 10% elsewhere."""

from __future__ import annotations

import sys
import time

from converters.progress import Progress


class ProgressDisplay:
    """Shows progress; used as a context manager, it removes its line from a terminal at the end."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._rewritten = 0.0
        self._tenths = 0
        self._terminal = sys.stderr.isatty()

    def show(self, progress: Progress) -> None:
        """Show the share done, an estimate of the time left, and the current step."""
        if self._terminal:
            now = time.monotonic()
            if now - self._rewritten >= 0.1 or progress.done >= progress.total:
                self._rewritten = now
                self._rewrite(self._text(progress))
            return
        tenths = 10 * progress.done // max(progress.total, 1)
        if tenths > self._tenths:
            self._tenths = tenths
            print(self._text(progress), file=sys.stderr, flush=True)

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._terminal:
            self._rewrite("")

    def _text(self, progress: Progress) -> str:
        elapsed = time.monotonic() - self._started
        left = elapsed * (progress.total - progress.done) / max(progress.done, 1)
        return f"{progress.done / max(progress.total, 1):4.0%}  {left:4.0f} s left  {progress.name}"

    @staticmethod
    def _rewrite(text: str) -> None:
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
