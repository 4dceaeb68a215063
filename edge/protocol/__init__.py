"""What is said between a client and a node: requests, answers, frames, and the strict JSON below them."""
