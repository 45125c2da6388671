"""Numbers as the kernels take them apart: powers of two, and float32 as a sum of two float16."""

import triton
import triton.language as tl

SMALLEST_NORMAL = tl.constexpr(2.0**-14)
"""The smallest normal float16. Smaller values are set to zero, since some matrix units take subnormals for zero."""

LOW_SCALE = tl.constexpr(2048.0)
"""The low part is kept this much larger, 2^11, which leaves it as many bits as the high part has."""

UNIT = tl.constexpr(2.0**-24)
"""Unit roundoff of float32."""


@triton.jit
def exponent_of(value):
    """Return e with |value| < 2^e for a finite float32 or float64; for zero, a very small number."""
    if value.dtype == tl.float64:
        exponent = ((value.to(tl.int64, bitcast=True) >> 52) & 0x7FF).to(tl.int32) - 1022
    else:
        exponent = ((value.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 126
    return exponent


@triton.jit
def power_of_two(exponent, dtype: tl.constexpr):
    """Return 2^exponent, the exponent clamped to the normal numbers of `dtype`."""
    if dtype == tl.float64:
        biased = (tl.minimum(tl.maximum(exponent, -1022), 1023) + 1023).to(tl.int64)
        power = (biased << 52).to(tl.float64, bitcast=True)
    else:
        power = ((tl.minimum(tl.maximum(exponent, -126), 127) + 127) << 23).to(tl.float32, bitcast=True)
    return power


@triton.jit
def to_float16(value):
    """Round to float16, with values below SMALLEST_NORMAL set to zero."""
    return tl.where(tl.abs(value) < SMALLEST_NORMAL, 0.0, value).to(tl.float16)


@triton.jit
def split(value):
    """Return (high, low, |value - high|, |value - high - low / LOW_SCALE|) of a float32 below 2^15.

    high and low are its float16 parts; the remainders are exact.
    """
    high = to_float16(value)
    rest = value - high.to(tl.float32)
    low = to_float16(rest * LOW_SCALE)
    return high, low, tl.abs(rest), tl.abs(rest - low.to(tl.float32) * (1.0 / LOW_SCALE))


@triton.jit
def is_finite(value):
    """Zero times anything but a number is a NaN."""
    return value * 0 == 0
