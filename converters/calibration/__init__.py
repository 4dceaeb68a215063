"""Calibrated quantisation: smoothed activations, and codes and formats of least output error."""
