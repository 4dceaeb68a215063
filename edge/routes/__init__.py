"""Sensor readings in, events and questions out, without any I/O or thread."""
