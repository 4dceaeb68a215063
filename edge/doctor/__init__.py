"""What is wrong with a board, and the command that mends it."""
