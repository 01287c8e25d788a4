"""Parts of kernels: dynamic8's codes from fractions of a scale, and back.

There is one look-up to decode an element and one to encode it, both through shared memory. From global memory each
would touch most of a map's lines for every 32 elements, and compute 64-bit addresses. Encoding guesses an element's
place among the borders by arithmetic, to within a half, and the border there decides: codes are exact, however the
arithmetic rounds.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def look_up(table, index):
    """``table[index]``: of a vector, at int32 indices of any shape, through shared memory."""
    return tl.gather(table, tl.ravel(index), 0).reshape(index.shape)


@triton.jit
def encode(fractions, above, SIGNED: tl.constexpr):
    """The number of borders below each fraction: codes of the nearest levels, uint8.

    Args:
        fractions: fp32, of any shape, no NaN, at most 1.004 in magnitude; not negative if not SIGNED.
        above: fp32 [256], the smallest number above the border before each code; -inf before the first.
    """
    code = guess(fractions, SIGNED).to(tl.uint32).to(tl.int32)  # 0 where a guess is negative, on GPUs
    # Before the border there is the code below. The sign of a difference as 0 or -1 costs less than to compare and
    # choose.
    before = (fractions - look_up(above, code)).to(tl.int32, bitcast=True) >> 31
    return (code + before).to(tl.uint8)


@triton.jit
def guess(x, SIGNED: tl.constexpr):
    """Where fractions lie in the map, fp32, above 0 and below 256: at the border before code c between c and c + 1.

    In a decade the map's levels are equally far apart, so a sum of ramps fits it, one for each decade. The last needs
    no end.
    """
    if SIGNED:
        # Odd around zero, but for half a code. The two smallest decades, which have three levels, share a ramp.
        place = 4.7382 * _ramp(x, 0.5 / 4.5e-6, 0.5) + 71.6111
        place += 8.4840 * _ramp(x, 0.5e4, 0.5)
        place += 14.2222 * _ramp(x, 0.5e3, 0.5)
        place += 28.4444 * _ramp(x, 0.5e2, 0.5)
        place += 56.8889 * _ramp(x, 0.5e1, 0.5)
        place += 71.1111 * x
    else:
        place = 1.8056 * _ramp(x, 1e6, 0.0) + 1.15
        place += 3.5556 * _ramp(x, 1e5, 0.0)
        place += 7.1111 * _ramp(x, 1e4, 0.0)
        place += 14.2222 * _ramp(x, 1e3, 0.0)
        place += 28.4444 * _ramp(x, 1e2, 0.0)
        place += 56.8889 * _ramp(x, 1e1, 0.0)
        place += 142.2222 * x
    return place


@triton.jit
def _ramp(x, slope, start):
    """A line that ends at 0 and at 1; GPUs clamp to [0, 1] at no cost."""
    return tl.minimum(tl.maximum(x * slope + start, 0.0), 1.0)
