"""The protocol between a client and a node: requests, answers, frames, and strict JSON."""
