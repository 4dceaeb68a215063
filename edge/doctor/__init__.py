"""Checks of a board and its connections, and the command that fixes each problem."""
