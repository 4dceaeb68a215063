"""What the runtime does to the input of a quantised matrix, so that calibration sees the same."""

from __future__ import annotations

import numpy as np

from converters.quantization import Floats

_LEVELS = np.float32(255)


def round_activations(x: Floats) -> Floats:
    """Round each row of x [n, k] to the 256 levels of a dynamic, asymmetric int8 row; the result is float32.

    XNNPACK's qd8, as `edge.runtime.decoder.dynamic_int8` has it for one row: its range, widened to hold 0, in
    255 steps, with an integer zero point.
    """
    low = np.minimum(x.min(axis=-1, keepdims=True), 0)
    high = np.maximum(x.max(axis=-1, keepdims=True), 0)
    span = high - low
    inverse = np.divide(_LEVELS, span, out=np.ones_like(span), where=span > np.finfo(np.float32).tiny)
    bottom, top = low * inverse, high * inverse
    zero = np.where((-128 + bottom) + (127 + top) > 0, -128 - bottom, 127 - top)
    zero = np.rint(np.clip(zero, -128, 127))
    rounded: Floats = x * inverse
    np.rint(rounded, out=rounded)
    np.clip(rounded, -128 - zero, 127 - zero, out=rounded)
    rounded /= inverse
    return rounded
