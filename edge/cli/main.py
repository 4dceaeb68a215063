"""`python -m edge`: both commands of the device in one, for where they are not installed on the PATH."""

import click

from edge.cli.ask import ask
from edge.cli.daemon import daemon
from edge.cli.program import Group


@click.group(cls=Group)
def main() -> None:
    """Run edge-daemon or edge-ask.

    \b
    Examples:
      python -m edge daemon doctor --config edge-daemon.toml
      python -m edge ask "Why would a pump's pressure fall at night?"
    """


main.add_command(daemon, "daemon")
main.add_command(ask, "ask")
