"""accumulate and apply, each in one pass: what a rank does to its piece of a matrix before and after the exchange.

References: ``MuonMatrix.accumulate`` and ``MuonMatrix.apply`` in ``muon_dist/muon.py``. No autotuning: a kernel
that updates in place must run once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from muon_dist.kernels import Encoded, look_ups, tables_of
from muon_dist.kernels.tiles import Tiling, load_levels, load_search, load_tile, store_tile, tile_of


def accumulate(gradient: Tensor, momentum: Encoded, packed: Encoded, beta: float, nesterov: bool) -> None:
    """Takes a gradient into a stored momentum and packs what is to be orthogonalised.

    Args:
        gradient: [rows, cols], fp32, bf16 or fp16; rows may have any stride, columns lie side by side.
        momentum: updated in place.
        packed: written. It fits the momentum, as ``kernels.fit`` says.
        beta, nesterov: as in Muon.
    """
    tiling = Tiling.of(gradient, momentum, packed)
    _accumulate[tiling.grid](
        gradient,
        *momentum.pointers[:2],
        *look_ups(tables_of(momentum, packed), gradient),
        *packed.pointers[:2],
        *tiling.shape,
        1 - beta,
        MOMENTUM=momentum.format,
        PACKED=packed.format,
        NESTEROV=nesterov,
        **tiling.constants,
    )


def apply(weight: Tensor, update: Encoded, decay: float, factor: float) -> None:
    """``weight`` <- decay ``weight`` + factor update, in fp32 arithmetic.

    Args:
        weight: [rows, cols], fp32, bf16 or fp16; rows may have any stride, columns lie side by side.
        update: of the same shape.
    """
    tiling = Tiling.of(weight, update)
    _apply[tiling.grid](
        weight,
        *update.pointers[:3],
        *tiling.shape,
        decay,
        factor,
        UPDATE=update.format,
        **tiling.constants,
    )


@triton.jit
def _accumulate(
    gradient,
    elements,
    scales,
    levels,
    search,
    packed,
    packed_scales,
    rows,
    cols,
    stride,
    blocks,
    numel,
    weight,
    MOMENTUM: tl.constexpr,
    PACKED: tl.constexpr,
    NESTEROV: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    levels = load_levels(levels, MOMENTUM)
    packed_search, search = load_search(search, PACKED), load_search(search, MOMENTUM)
    there, tile = tile_of(tl.program_id(0), rows, cols, stride, blocks, numel, BLOCK, ROWS, COLS)
    _, mask = tile[0]
    g = tl.load(gradient + there, mask=mask, other=0).to(tl.float32)
    g *= weight
    m = load_tile(elements, scales, levels, tile, 1 - weight, MOMENTUM) + g
    u = (1 - weight) * m + g if NESTEROV else m
    store_tile(u, packed, packed_scales, packed_search, tile, PACKED)
    store_tile(m, elements, scales, search, tile, MOMENTUM)


@triton.jit
def _apply(
    weight,
    elements,
    scales,
    levels,
    rows,
    cols,
    stride,
    blocks,
    numel,
    decay,
    factor,
    UPDATE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    levels = load_levels(levels, UPDATE)
    there, tile = tile_of(tl.program_id(0), rows, cols, stride, blocks, numel, BLOCK, ROWS, COLS)
    _, mask = tile[0]
    u = load_tile(elements, scales, levels, tile, factor, UPDATE)
    w = tl.load(weight + there, mask=mask, other=0).to(tl.float32)
    tl.store(weight + there, w * decay + u, mask=mask)
