"""What becomes of a request: queued, journalled, answered once."""
