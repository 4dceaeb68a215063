"""Requests and answers over serial lines."""
