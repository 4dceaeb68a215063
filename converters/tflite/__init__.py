"""A small graph builder and a streaming writer for the TFLite schema."""
