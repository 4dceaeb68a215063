"""Quantisation by what matrices compute: smoothed activations; codes and formats of least output error."""
