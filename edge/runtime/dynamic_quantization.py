"""XNNPACK's dynamic quantisation of activations (its qd8 type), the one statement of it in the project.

XNNPACK multiplies int8, int4 and int2 weights by activations that it rounds to int8 first, row by row. The
runtime needs the same rounding to compute single logits, calibration to see what a graph will compute.
Source: `xnn_f32_qd8_asymmetric_quantization_params` in XNNPACK's src/xnnpack/quantization.h.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_LEVELS = np.float32(255)


def dynamic_int8(x: Floats) -> tuple[Floats, Floats]:
    """Quantise each row of x [..., k] to int8 with a scale and an integer zero point of its own.

    Returns the codes minus the zero point [..., k], whole numbers, and the inverse scales [..., 1];
    their quotient is the rounded x. A row's range is widened to hold 0; a row of zeros keeps the inverse 1.
    """
    low = np.minimum(x.min(axis=-1, keepdims=True), np.float32(0))
    high = np.maximum(x.max(axis=-1, keepdims=True), np.float32(0))
    span = high - low
    inverse = np.divide(_LEVELS, span, out=np.ones_like(span), where=span > np.finfo(np.float32).tiny)
    bottom, top = low * inverse, high * inverse
    zero = np.where((-128 + bottom) + (127 + top) > 0, -128 - bottom, 127 - top)
    zero = np.rint(np.clip(zero, -128, 127))
    codes: Floats = x * inverse
    np.rint(codes, out=codes)
    np.clip(codes, -128 - zero, 127 - zero, out=codes)
    return codes, inverse
