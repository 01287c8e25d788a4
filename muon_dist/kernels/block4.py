"""Parts of kernels: 4-bit codes, two a byte, from fractions of a scale and back.

A tile's codes are loaded and stored as bytes [ROWS, COLS / 2], each once. A code is found by one look-up: fractions
fall into equal cells, so narrow that none has two borders, and the cell says how many borders lie below it and where
its own is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from muon_dist.kernels import CELLS, CELLS_PER_UNIT
from muon_dist.kernels.dynamic8 import look_up

_CELLS, _CELLS_PER_UNIT = tl.constexpr(CELLS), tl.constexpr(float(CELLS_PER_UNIT))
# That a thread takes at a time of those that lie side by side: as many elements as of bf16. With more, tiles change
# their layout on the way, and what is cheap is computed in both.
_BYTES = tl.constexpr(4)


@triton.jit
def load_search(search):
    """What ``nearest`` looks up, int64 [32]: the border in each cell, fp32, under the number of borders before it."""
    return tl.load(search + tl.arange(0, _CELLS))


@triton.jit
def nearest(fractions, search):
    """The number of borders below each fraction: codes of the nearest levels, int32. NaN has some code.

    Args:
        fractions: fp32 [ROWS, COLS], at most 1.01 in magnitude.
        search: what ``load_search`` made.
    """
    # Added to 2^20, a place among the cells lies in the last bits, with three binary digits behind the point.
    place = (fractions * _CELLS_PER_UNIT + (1048576.0 + _CELLS // 2)).to(tl.int32, bitcast=True)
    cell = look_up(search, (place >> 3) & (_CELLS - 1))
    border = cell.to(tl.int32).to(tl.float32, bitcast=True)
    # The sign of a difference costs less than to compare and choose.
    above = (border - fractions).to(tl.uint32, bitcast=True) >> 31
    return (cell >> 32).to(tl.int32) + above.to(tl.int32)


@triton.jit
def load_codes(elements, levels, pair, mask):
    """The levels of codes, fp32 [ROWS, COLS]; outside the mask, that of code 0.

    Args:
        pair: [ROWS, COLS / 2], places of bytes, and ``mask`` theirs.
    """
    there = tl.max_contiguous(elements + pair, (1, min(_BYTES, pair.shape[1])))
    codes = tl.load(there, mask=mask, other=0).to(tl.int32)
    return look_up(levels, tl.join(codes & 15, codes >> 4).reshape(codes.shape[0], 2 * codes.shape[1]))


@triton.jit
def store_codes(codes, elements, pair, mask):
    """Stores codes, int32 [ROWS, COLS]; ``pair`` and ``mask`` as for ``load_codes``."""
    first, second = codes.reshape(codes.shape[0], codes.shape[1] // 2, 2).split()
    there = tl.max_contiguous(elements + pair, (1, min(_BYTES, pair.shape[1])))
    tl.store(there, (first | (second << 4)).to(tl.uint8), mask=mask)
