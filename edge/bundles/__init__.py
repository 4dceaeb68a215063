"""Bundles: the format, installation, signatures, the store, failure records and memory requirements."""
