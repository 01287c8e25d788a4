"""Parts of kernels: a tile of encoded values, loaded as fp32 and stored back, in each of the formats.

A tile is some rows of one block: [ROWS, COLS], where COLS is the block length rounded up to a power of two. Kernels say
where it is by three places with their masks, and one mask more:

- among elements, [ROWS, COLS];
- among bytes of two codes, [ROWS, COLS / 2];
- among scales, [ROWS, 1];
- which elements are there in the rows that are, [ROWS, COLS].

The formats and their rounding are those of ``muon_dist.codecs``; their docstrings have the sources.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from muon_dist.kernels import Encoded, block4, dynamic8
from muon_dist.kernels.dynamic8 import look_up

# Elements of a tile: 16 a thread in four warps. Measured: smaller and larger tiles are slower.
TILE_ELEMENTS = 2048
# Block of formats without scales: only the shape of a tile.
_PLAIN_BLOCK = 128
# As codecs.blocks.SMALLEST_SCALE.
_SMALLEST_SCALE = tl.constexpr(2.0**-100)


class Tiling(NamedTuple):
    """How [rows, cols] values are cut into tiles: the grid, what it lies on, and what kernels take as constants.

    Where memory allows, they are folded into one column of blocks: tiles are then contiguous, and short rows, flat
    shards and vectors fill them as well as large matrices do.
    """

    grid: tuple[int, int]
    shape: tuple[int, int, int, int, int]  # rows, columns, stride of the plain tensor's rows, blocks in a row, elements
    constants: dict[str, int]

    @classmethod
    def of(cls, plain: Tensor, *values: Encoded) -> Tiling:
        """A tile is some rows of one block of ``values``, which have one block among them, or none.

        Args:
            plain: [rows, cols], the gradient or weight; rows may have any stride.
            values: contiguous, of the same shape.
        """
        rows, cols = plain.shape
        return _tiling(rows, cols, plain.stride(0), block_of(cols, *values))


def block_of(cols: int, *values: Encoded) -> int:
    """The block that ``values`` have among them, in rows of ``cols`` elements, or the one for values without."""
    return next((min(v.block, cols) for v in values if v.block is not None), min(_PLAIN_BLOCK, cols))


@lru_cache(maxsize=4096)
def _tiling(rows: int, cols: int, stride: int, block: int) -> Tiling:
    numel = rows * cols
    if rows == 1 or (cols % block == 0 and stride == cols):
        rows, cols, stride = -(-numel // block), block, block
    width = 1 << (block - 1).bit_length()
    height = max(1, TILE_ELEMENTS // width)
    blocks = -(-cols // block)
    grid = (-(-rows // height), blocks)
    return Tiling(grid, (rows, cols, stride, blocks, numel), {"BLOCK": block, "ROWS": height, "COLS": width})


@triton.jit
def tile_of(tile, rows, cols, stride, blocks, numel, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Of the tiles below each other the one at a place, in the program's column of blocks: places [ROWS, COLS] in the
    plain tensor, and what ``load_tile`` takes; all 64 bits wide."""
    row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    inside = tl.arange(0, COLS)[None, :]
    col = tl.program_id(1) * BLOCK + inside
    place = row * cols + col
    mask = (row < rows) & (inside < BLOCK) & (col < cols) & (place < numel)
    half: tl.constexpr = max(1, COLS // 2)
    first = 2 * tl.arange(0, half)[None, :]
    first_col = tl.program_id(1) * BLOCK + first
    pair = row * (cols // 2) + tl.program_id(1) * (BLOCK // 2) + tl.arange(0, half)[None, :]
    pair_mask = (row < rows) & (first < BLOCK) & (first_col < cols) & (row * cols + first_col < numel)
    scale_place = row * blocks + tl.program_id(1)
    return row * stride + col, ((place, mask), (pair, pair_mask), (scale_place, row < rows), mask)


@triton.jit
def load_levels(levels, FORMAT: tl.constexpr):
    """What ``load_tile`` looks up; kernels load it before all else, so that it is there when it is needed."""
    if FORMAT == "dynamic8" or FORMAT == "unsigned8":
        levels = tl.load(levels + tl.arange(0, 256))
    elif FORMAT == "block4" or FORMAT == "grid4":
        levels = tl.load(levels + tl.arange(0, 16))
    return levels


@triton.jit
def load_search(search, FORMAT: tl.constexpr):
    """What ``store_tile`` looks up, likewise."""
    if FORMAT == "dynamic8" or FORMAT == "unsigned8":
        search = tl.load(search + tl.arange(0, 256))
    elif FORMAT == "block4":
        search = block4.load_search(search)
    return search


@triton.jit
def load_tile(elements, scales, levels, tile, factor, FORMAT: tl.constexpr):
    """The stored values of a tile times ``factor``, fp32; zeros where there are none, in the rows that are."""
    of_elements, of_pairs, of_scales, exists = tile
    place, mask = of_elements
    pair, pair_mask = of_pairs
    scale_place, scale_mask = of_scales
    if FORMAT == "block4":
        values = block4.load_codes(elements, levels, pair, pair_mask)
    else:
        stored = tl.load(elements + place, mask=mask)
        if FORMAT == "linear8":
            values = stored.to(tl.float32) * (1 / 127.0)
        elif FORMAT == "dynamic8" or FORMAT == "unsigned8":
            values = look_up(levels, stored.to(tl.int32))
        else:
            values = stored.to(tl.float32)
    if FORMAT == "linear8" or FORMAT == "dynamic8" or FORMAT == "unsigned8" or FORMAT == "block4":
        factor *= tl.load(scales + scale_place, mask=scale_mask).to(tl.float32)
    return tl.where(exists, values * factor, 0.0)


@triton.jit
def store_tile(values, elements, scales, search, tile, FORMAT: tl.constexpr):
    """Encodes a tile and stores it. ``values`` are zero outside the mask."""
    of_elements, of_pairs, of_scales, exists = tile
    place, mask = of_elements
    pair, pair_mask = of_pairs
    scale_place, scale_mask = of_scales
    if FORMAT == "linear8":
        codes, scale = encode_linear8(values)
        tl.store(elements + place, codes, mask=mask)
        tl.store(scales + scale_place, scale, mask=scale_mask)
    elif FORMAT == "dynamic8" or FORMAT == "unsigned8":
        codes, scale = encode_dynamic8(values, search, FORMAT == "dynamic8")
        tl.store(elements + place, codes, mask=mask)
        tl.store(scales + scale_place, scale, mask=scale_mask)
    elif FORMAT == "block4":
        codes, scale = encode_nearest(values, search)
        block4.store_codes(tl.where(exists, codes, 0), elements, pair, pair_mask)
        tl.store(scales + scale_place, scale, mask=scale_mask)
    else:
        tl.store(elements + place, values, mask=mask)


@triton.jit
def encode_nearest(values, search):
    """Codes of a map of 16 levels, int32 [ROWS, COLS], and bf16 scales [ROWS, 1]."""
    scale, inverse = _scale(_largest(values, 1))
    return block4.nearest(values * inverse, search), scale


@triton.jit
def encode_grid(values):
    """Codes of int4's map with the smaller of two scales for each element, and bf16 scales [ROWS, 1] and [1, COLS]."""
    of_row, of_row_inverse = _scale(_largest(values, 1))
    of_column, of_column_inverse = _scale(_largest(values, 0))
    rows, columns = of_row.to(tl.float32), of_column.to(tl.float32)
    inverse = tl.where(rows < columns, of_row_inverse, of_column_inverse)  # zero where the smaller scale is
    codes = tl.floor(values * (inverse * 7.0) + 8.5).to(tl.int32)
    return tl.minimum(tl.maximum(codes, 0), 15), of_row, of_column


@triton.jit
def encode_linear8(values):
    """int8 codes [ROWS, COLS] and bf16 scales [ROWS, 1]."""
    scale, inverse = _scale(_largest(values, 1))
    steps = values * (inverse * 127.0)
    # Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even; the interpreter has no rint.
    steps = (steps + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(steps, -127.0), 127.0).to(tl.int8), scale


@triton.jit
def encode_dynamic8(values, search, SIGNED: tl.constexpr):
    """uint8 codes [ROWS, COLS] and bf16 scales [ROWS, 1], with the sign of the largest element."""
    largest = _storable(_signed_largest(values) if SIGNED else _largest(values, 1))
    return dynamic8.encode(values, _inverse(largest), search, SIGNED), _round_to_bf16(largest).to(tl.bfloat16)


@triton.jit
def _largest(values, AXIS: tl.constexpr):
    """The largest magnitude of each row, or of each column; NaN where there is one: as integers, magnitudes come in the
    same order, and NaN after all others."""
    magnitudes = tl.abs(values).to(tl.int32, bitcast=True)
    return tl.max(magnitudes, axis=AXIS, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def _signed_largest(values):
    """The largest of each row by magnitude, of two the positive one; NaN where there is one. As integers, positive
    numbers come in their order, and negative ones after all of them, by magnitude, if the sign is a digit."""
    bits = values.to(tl.int32, bitcast=True)
    high = tl.maximum(tl.max(bits, axis=1, keep_dims=True), 0)
    low = tl.max(bits.to(tl.uint32, bitcast=True), axis=1, keep_dims=True).to(tl.int32, bitcast=True)
    return tl.where((low < 0) & ((low & 0x7FFFFFFF) > high), low, high).to(tl.float32, bitcast=True)


@triton.jit
def _scale(largest):
    """The scale of a block whose largest element is ``largest``, bf16, and its fp32 inverse."""
    wide = _round_to_bf16(_storable(largest))
    return wide.to(tl.bfloat16), _inverse(wide)


@triton.jit
def _storable(largest):
    """``largest``, or 0 for blocks too small to store; NaN shows."""
    return tl.where(tl.abs(largest) < _SMALLEST_SCALE, 0.0, largest)


@triton.jit
def _inverse(x):
    """1 / x, or 0 for blocks that are stored as zeros."""
    return tl.where(tl.abs(x) < _SMALLEST_SCALE, 0.0, tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x))


@triton.jit
def _round_to_bf16(x):
    """The bf16 number nearest to x, ties to even, still in fp32: the interpreter's own cast cuts digits off."""
    bits = x.to(tl.int32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x != x, x, nearest.to(tl.float32, bitcast=True))
