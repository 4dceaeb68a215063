"""Rounds the input of a quantised matrix as the runtime does, for calibration."""

from __future__ import annotations

from converters.quantization import Floats
from edge.runtime.dynamic_quantization import dynamic_int8


def round_activations(x: Floats) -> Floats:
    """Round each row of x [n, k] as XNNPACK does before it multiplies by quantised weights: [n, k]."""
    codes, inverse = dynamic_int8(x)
    codes /= inverse
    return codes
