"""From sensor readings to events and questions; no I/O and no threads."""
