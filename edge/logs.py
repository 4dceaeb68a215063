"""The daemon's log on stderr: one line an event, and what requests say only if it is asked for."""

from __future__ import annotations

import logging
import os
import sys

PAYLOADS = "edge.payloads"
"""The logger of requests and answers in full; silent unless `log_payloads` is set."""


def log_to_stderr(payloads: bool) -> None:
    """Log to stderr from now on; with the priorities of sd-daemon(3) where journald reads them.

    Requests and answers are logged in full only if `payloads` is set.
    """
    handler = logging.StreamHandler(sys.stderr)
    journald = "JOURNAL_STREAM" in os.environ
    handler.setFormatter(
        _Priorities() if journald else logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger(PAYLOADS).setLevel(logging.INFO if payloads else logging.WARNING)


class _Priorities(logging.Formatter):
    """Prefixes each line with the syslog priority, `<6>` for information."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; each line of a traceback gets the priority too."""
        levels = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
        priority = next((number for level, number in levels if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())
