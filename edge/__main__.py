"""`python -m edge daemon ...` and `python -m edge ask ...`."""

from edge.cli.entry import run

run("edge.cli.main", "main")
