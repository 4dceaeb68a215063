"""The daemon: everything above wired together, its bundle watched over, its health told."""
