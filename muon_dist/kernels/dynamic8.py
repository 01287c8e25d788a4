"""Parts of kernels: dynamic8's codes from fractions of a scale, and back.

There is one look-up to decode an element and one to encode it, both through shared memory. From global memory each
would touch most of a map's lines for every 32 elements, and compute 64-bit addresses. Encoding guesses an element's
place among the borders by arithmetic, to within a half, and the border there decides: codes are exact, however the
arithmetic rounds.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What a guess of 1 stands for: the last code, and less than a half.
_LAST = tl.constexpr(255.4)


@triton.jit
def look_up(table, index):
    """``table[index]``: of a vector, at int32 indices of any shape, through shared memory."""
    return tl.gather(table, tl.ravel(index), 0).reshape(index.shape)


@triton.jit
def encode(values, inverse, above, SIGNED: tl.constexpr):
    """The number of borders below each fraction ``values * inverse``: codes of the nearest levels, uint8. NaN has some
    code.

    Args:
        values: fp32, of any shape.
        inverse: fp32, of that shape or one that broadcasts; of each block's largest element.
        above: fp32 [256], the smallest number above the border before each code; -inf before the first.
    """
    # Added to 2, of which the bits are 1 << 30, the guess is rounded, and in the last ones. An address takes it shifted
    # by two, so that to clear the first ones costs nothing.
    code = (guess(values, inverse, SIGNED) * (_LAST * 2.0**-22) + 2.0).to(tl.int32, bitcast=True) & ((1 << 30) - 1)
    # Before the border there is the code below. The sign of a difference as 0 or -1 costs less than to compare and
    # choose.
    before = (values * inverse - look_up(above, code)).to(tl.int32, bitcast=True) >> 31
    return (code + before).to(tl.uint8)


@triton.jit
def guess(x, inverse, SIGNED: tl.constexpr):
    """Where fractions ``x * inverse`` lie in the map, fp32 from 0 to 1: times ``_LAST``, within a half of code c at the
    border before it. NaN lies at 0.

    In a decade the map's levels are equally far apart, so a sum of ramps fits it, one for each decade. Their slopes are
    scaled once a block, instead of elements.
    """
    if SIGNED:
        # Odd around zero, but for half a code. The two smallest decades, which have three levels, share a ramp.
        place = 4.7382 / _LAST * _ramp(x, inverse * (0.5 / 4.5e-6), 0.5) + 71.1111 / _LAST
        place += 8.4840 / _LAST * _ramp(x, inverse * 0.5e4, 0.5)
        place += 14.2222 / _LAST * _ramp(x, inverse * 0.5e3, 0.5)
        place += 28.4444 / _LAST * _ramp(x, inverse * 0.5e2, 0.5)
        place += 56.8889 / _LAST * _ramp(x, inverse * 0.5e1, 0.5)
        slope = 71.1111 / _LAST
    else:
        place = 1.8056 / _LAST * _ramp(x, inverse * 1e6, 0.0) + 0.65 / _LAST
        place += 3.5556 / _LAST * _ramp(x, inverse * 1e5, 0.0)
        place += 7.1111 / _LAST * _ramp(x, inverse * 1e4, 0.0)
        place += 14.2222 / _LAST * _ramp(x, inverse * 1e3, 0.0)
        place += 28.4444 / _LAST * _ramp(x, inverse * 1e2, 0.0)
        place += 56.8889 / _LAST * _ramp(x, inverse * 1e1, 0.0)
        slope = 142.2222 / _LAST
    return _ramp(x, inverse * slope, place)


@triton.jit
def _ramp(x, slope, start):
    """A line that ends at 0 and at 1; GPUs clamp to [0, 1] at no cost."""
    return tl.minimum(tl.maximum(x * slope + start, 0.0), 1.0)
