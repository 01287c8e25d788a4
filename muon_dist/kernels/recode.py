"""Values into a stored format and back, each in one pass: for parts of states that are products' operands, and for
pieces between a buffer and the matrices that they are cut from.

References: ``encode`` and ``decode`` of the codecs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from muon_dist.kernels import Encoded
from muon_dist.kernels.compiled import Compiled
from muon_dist.kernels.tiles import Tiling, load_levels, load_search, load_tile, store_tile, tile_of


def encode(values: Tensor, stored: Encoded) -> None:
    """Writes ``values`` ([n, m, rows, cols], any floating-point type) into ``stored``.

    Args:
        values: columns lie side by side, the other axes have any strides.
        stored: buffers of [n, m, rows, ...]; the last two axes contiguous, the others of any strides.
    """
    _launch(_ENCODE, values, stored, stored.pointers)


def decode(stored: Encoded, out: Tensor) -> None:
    """Reads ``stored`` into ``out``, both as for ``encode``."""
    _launch(_DECODE, out, stored, stored.pointers[:3])


def _launch(kernel: Compiled, values: Tensor, stored: Encoded, pointers: tuple[Tensor, ...]) -> None:
    n, m = values.shape[:2]
    tiling = Tiling.of(values[0, 0], stored)
    # From one of the n, or of the m, to the next: of values, elements and scales.
    strides = (stride for buffer in (values, *pointers[:2]) for stride in buffer.stride()[:2])
    numbers, constants = (*tiling.shape, m, *strides), tuple(tiling.constants.values())
    addresses = tuple(buffer.data_ptr() % 16 for buffer in (values, *pointers))
    key = (numbers, constants, addresses, values.dtype, stored.format, values.device)
    height, width = tiling.grid
    kernel.launch(key, (n * m * height, width), (values, *pointers, *numbers, stored.format, *constants))


@triton.jit
def _tile_and_piece(rows, ROWS: tl.constexpr):
    """Of this program: pieces are tiled one after the other along the first axis, the only one of which GPUs have as
    many places as there may be pieces."""
    height = tl.cdiv(rows, ROWS)
    return tl.program_id(0) % height, tl.program_id(0) // height


@triton.jit
def _start(buffer, piece, m, stride0, stride1):
    """Of a piece, of [n, m], in a buffer."""
    return buffer + (piece // m).to(tl.int64) * stride0 + (piece % m).to(tl.int64) * stride1


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
    m,
    values_stride0,
    values_stride1,
    elements_stride0,
    elements_stride1,
    scales_stride0,
    scales_stride1,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    index, piece = _tile_and_piece(rows, ROWS)
    values = _start(values, piece, m, values_stride0, values_stride1)
    elements = _start(elements, piece, m, elements_stride0, elements_stride1)
    scales = _start(scales, piece, m, scales_stride0, scales_stride1)
    there, tile = tile_of(index, rows, cols, stride, blocks, numel, BLOCK, ROWS, COLS)
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
    m,
    values_stride0,
    values_stride1,
    elements_stride0,
    elements_stride1,
    scales_stride0,
    scales_stride1,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    index, piece = _tile_and_piece(rows, ROWS)
    out = _start(out, piece, m, values_stride0, values_stride1)
    elements = _start(elements, piece, m, elements_stride0, elements_stride1)
    scales = _start(scales, piece, m, scales_stride0, scales_stride1)
    there, tile = tile_of(index, rows, cols, stride, blocks, numel, BLOCK, ROWS, COLS)
    _, mask = tile[0]
    levels = load_levels(levels, FORMAT)
    x = load_tile(elements, scales, levels, tile, 1.0, FORMAT)
    tl.store(out + there, x, mask=mask)


_ENCODE, _DECODE = Compiled(_encode), Compiled(_decode)
