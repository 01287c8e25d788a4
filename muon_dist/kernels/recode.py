"""Values into a stored format and back, each in one pass: for parts of states that are products' operands.

References: ``encode`` and ``decode`` of the codecs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from muon_dist.kernels import Encoded
from muon_dist.kernels.tiles import Tiling, load_tile, store_tile, tile_of


def encode(values: Tensor, stored: Encoded) -> None:
    """Writes ``values`` ([rows, cols], contiguous, any floating-point type) into ``stored``."""
    tiling = Tiling.of(values, stored)
    _encode[tiling.grid](values, *stored.pointers, *tiling.shape, FORMAT=stored.format, **tiling.constants)


def decode(stored: Encoded, out: Tensor) -> None:
    """Reads ``stored`` into ``out`` ([rows, cols], contiguous, any floating-point type)."""
    tiling = Tiling.of(out, stored)
    _decode[tiling.grid](out, *stored.pointers[:3], *tiling.shape, FORMAT=stored.format, **tiling.constants)


@triton.jit
def _encode(
    values,
    elements,
    scales,
    levels,
    borders,
    starts,
    rows,
    cols,
    stride,
    blocks,
    numel,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    there, place, mask, scale_place, scale_mask = tile_of(rows, cols, stride, blocks, numel, BLOCK, ROWS, COLS)
    x = tl.load(values + there, mask=mask, other=0).to(tl.float32)
    store_tile(x, elements, scales, borders, starts, place, mask, scale_place, scale_mask, FORMAT)


@triton.jit
def _decode(
    out,
    elements,
    scales,
    levels,
    rows,
    cols,
    stride,
    blocks,
    numel,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    there, place, mask, scale_place, scale_mask = tile_of(rows, cols, stride, blocks, numel, BLOCK, ROWS, COLS)
    x = load_tile(elements, scales, levels, place, mask, scale_place, scale_mask, FORMAT)
    tl.store(out + there, x, mask=mask)
