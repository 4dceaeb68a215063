"""Coverage-guided fuzzing of every reader of untrusted input; `make fuzz` runs it."""
