"""Measurements, run by `make bench`; they print numbers and assert nothing."""
