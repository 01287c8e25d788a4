"""Values into a stored format and back, each in one pass: for parts of states that are products' operands.

References: ``encode`` and ``decode`` of the codecs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from muon_dist.kernels import Encoded
from muon_dist.kernels.tiles import Tiling, load_levels, load_search, load_tile, store_tile, tile_of


def encode(values: Tensor, stored: Encoded) -> None:
    """Writes ``values`` ([n, rows, cols], contiguous, any floating-point type) into ``stored``.

    Args:
        stored: buffers of [n, rows, ...], each of the n contiguous, at any distance from the next.
    """
    tiling = Tiling.of(values[0], stored)
    _encode[(*tiling.grid, len(values))](
        values, *stored.pointers, *tiling.shape, *_strides(stored), FORMAT=stored.format, **tiling.constants
    )


def decode(stored: Encoded, out: Tensor) -> None:
    """Reads ``stored`` into ``out`` ([n, rows, cols], contiguous, any floating-point type); buffers as for encode."""
    tiling = Tiling.of(out[0], stored)
    _decode[(*tiling.grid, len(out))](
        out, *stored.pointers[:3], *tiling.shape, *_strides(stored), FORMAT=stored.format, **tiling.constants
    )


def _strides(stored: Encoded) -> list[int]:
    """From one of the n to the next, of elements and of scales."""
    return [pointer.stride(0) for pointer in stored.pointers[:2]]


@triton.jit
def _encode(
    values,
    elements,
    scales,
    levels,
    search,
    rows,
    cols,
    stride,
    blocks,
    numel,
    elements_stride,
    scales_stride,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    i = tl.program_id(2).to(tl.int64)
    values, elements, scales = values + i * numel, elements + i * elements_stride, scales + i * scales_stride
    there, tile = tile_of(rows, cols, stride, blocks, numel, BLOCK, ROWS, COLS)
    _, mask = tile[0]
    search = load_search(search, FORMAT)
    x = tl.load(values + there, mask=mask, other=0).to(tl.float32)
    store_tile(x, elements, scales, search, tile, FORMAT)


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
    elements_stride,
    scales_stride,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    i = tl.program_id(2).to(tl.int64)
    out, elements, scales = out + i * numel, elements + i * elements_stride, scales + i * scales_stride
    there, tile = tile_of(rows, cols, stride, blocks, numel, BLOCK, ROWS, COLS)
    _, mask = tile[0]
    levels = load_levels(levels, FORMAT)
    x = load_tile(elements, scales, levels, tile, 1.0, FORMAT)
    tl.store(out + there, x, mask=mask)
