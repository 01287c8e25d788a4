"""Parts of kernels: a tile of encoded values, loaded as fp32 and stored back, in each of the formats.

A tile is some rows of one block: [ROWS, COLS], where COLS is the block length rounded up to a power of two. The
formats and their rounding are those of ``muon_dist.codecs``; their docstrings have the sources.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from muon_dist.kernels import Encoded

# Elements of a tile: 32 a thread in four warps.
_TILE_ELEMENTS = 4096
# Block of formats without scales: only the shape of a tile.
_PLAIN_BLOCK = 128
# As codecs.blocks.SMALLEST_SCALE.
_SMALLEST_SCALE = tl.constexpr(2.0**-100)


class Tiling(NamedTuple):
    """How values are cut into tiles: the grid, the matrix of blocks under it, and what kernels take as constants.

    A single row, a flat shard or a vector, is folded into rows of one block each.
    """

    grid: tuple[int, int]
    shape: tuple[int, int, int, int]  # rows, columns, blocks in a row, elements: the last row may be short
    constants: dict[str, int]

    @classmethod
    def of(cls, rows: int, cols: int, *values: Encoded) -> Tiling:
        """A tile is some rows of one block of ``values``, which have one block among them, or none."""
        plain = _TILE_ELEMENTS if 1 < rows < _TILE_ELEMENTS // _PLAIN_BLOCK else _PLAIN_BLOCK
        block = next((min(v.block, cols) for v in values if v.block is not None), min(plain, cols))
        numel = rows * cols
        if rows == 1:
            rows, cols = triton.cdiv(cols, block), block
        width = triton.next_power_of_2(block)
        height = max(1, _TILE_ELEMENTS // width)
        blocks = triton.cdiv(cols, block)
        constants = {"BLOCK": block, "ROWS": height, "COLS": width}
        return cls((triton.cdiv(rows, height), blocks), (rows, cols, blocks, numel), constants)

    def row_stride(self, tensor: Tensor) -> int:
        """Elements from one row to the next of a tensor that was given as [rows, cols]."""
        return self.shape[1] if tensor.shape[0] == 1 else tensor.stride(0)


@triton.jit
def tile_of(rows, cols, numel, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows [ROWS, 1], columns [1, COLS] and mask of this program's tile; the row index is 64 bits wide."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    inside = tl.arange(0, COLS)[None, :]
    col = tl.program_id(1) * BLOCK + inside
    return row, col, (row < rows) & (inside < BLOCK) & (col < cols) & (row * cols + col < numel)


@triton.jit
def load_tile(elements, scales, levels, row, col, mask, rows, cols, blocks, FORMAT: tl.constexpr):
    """The stored values of a tile, fp32; zeros outside the mask."""
    stored = tl.load(elements + row * cols + col, mask=mask, other=0)
    if FORMAT == "linear8" or FORMAT == "dynamic8":
        scale = tl.load(scales + row * blocks + tl.program_id(1), mask=row < rows, other=0).to(tl.float32)
        if FORMAT == "linear8":
            values = stored.to(tl.float32) * (1 / 127.0) * scale
        else:
            values = tl.load(levels + stored.to(tl.int32)) * scale
    else:
        values = stored.to(tl.float32)
    return tl.where(mask, values, 0.0)


@triton.jit
def store_tile(values, elements, scales, borders, row, col, mask, rows, cols, blocks, FORMAT: tl.constexpr):
    """Encodes a tile and stores it. ``values`` are zero outside the mask."""
    if FORMAT == "linear8":
        codes, scale = encode_linear8(values)
        tl.store(elements + row * cols + col, codes, mask=mask)
        tl.store(scales + row * blocks + tl.program_id(1), scale, mask=row < rows)
    elif FORMAT == "dynamic8":
        codes, scale = encode_dynamic8(values, borders)
        tl.store(elements + row * cols + col, codes, mask=mask)
        tl.store(scales + row * blocks + tl.program_id(1), scale, mask=row < rows)
    else:
        tl.store(elements + row * cols + col, values, mask=mask)


@triton.jit
def encode_linear8(values):
    """int8 codes [ROWS, COLS] and bf16 scales [ROWS, 1]."""
    scale, inverse = _scale(tl.max(tl.abs(values), axis=1, keep_dims=True), values)
    steps = values * (inverse * 127.0)
    # Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even; the interpreter has no rint.
    steps = (steps + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(steps, -127.0), 127.0).to(tl.int8), scale


@triton.jit
def encode_dynamic8(values, borders):
    """uint8 codes [ROWS, COLS] and bf16 scales [ROWS, 1], with the sign of the largest element."""
    high = tl.max(values, axis=1, keep_dims=True)
    low = tl.min(values, axis=1, keep_dims=True)
    largest = tl.where(high >= -low, high, low)
    scale, inverse = _scale(largest, values)
    fractions = tl.where((values == largest) & (scale.to(tl.float32) != 0), 1.0, values * inverse)
    codes = tl.zeros(values.shape, tl.int32)  # how many of the 255 borders lie below
    for power in tl.static_range(8):
        step = 128 >> power
        border = tl.load(borders + codes + (step - 1))
        codes = tl.where(fractions > border, codes + step, codes)
    return codes.to(tl.uint8), scale


@triton.jit
def _scale(largest, values):
    """bf16 scale of each row's largest element, and its fp32 inverse; 0 for blocks too small to store, NaN shows."""
    missing = tl.max((values != values).to(tl.int32), axis=1, keep_dims=True)  # tl.max passes over NaN
    largest = tl.where(missing > 0, float("nan"), largest)
    wide = _round_to_bf16(tl.where(tl.abs(largest) < _SMALLEST_SCALE, 0.0, largest))
    inverse = tl.where(tl.abs(wide) < _SMALLEST_SCALE, 0.0, tl.div_rn(tl.full(wide.shape, 1.0, tl.float32), wide))
    return wide.to(tl.bfloat16), inverse


@triton.jit
def _round_to_bf16(x):
    """The bf16 number nearest to x, ties to even, still in fp32: the interpreter's own cast cuts digits off."""
    bits = x.to(tl.int32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x != x, x, nearest.to(tl.float32, bitcast=True))
