"""AdamW in one pass over a parameter and both moments, fp32 or dynamic8.

Reference: ``AdamWParameter.update`` in ``muon_dist/adamw.py``.

Source of the update: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from muon_dist.kernels import Encoded
from muon_dist.kernels.tiles import Tiling, load_tile, store_tile, tile_of


def adamw(
    weight: Tensor,
    gradient: Tensor,
    step: Tensor,
    first: Encoded,
    second: Encoded,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step.

    Args:
        weight, gradient: [rows, cols], contiguous, fp32, bf16 or fp16.
        step: fp32 scalar on the same device: the number of this step, from 1; 0 for one that is not taken, which
            changes nothing.
        first, second: the moments, in one format and block; updated in place.
    """
    tiling = Tiling.of(weight, first, second)
    _adamw[tiling.grid](
        weight,
        gradient,
        step,
        *first.pointers,
        *second.pointers,
        *tiling.shape,
        lr,
        1 - betas[0],
        1 - betas[1],
        math.log2(betas[0]) if betas[0] else -math.inf,
        math.log2(betas[1]) if betas[1] else -math.inf,
        eps,
        1 - lr * weight_decay,
        FORMAT=first.format,
        **tiling.constants,
    )


@triton.jit
def _adamw(
    weight,
    gradient,
    step,
    first,
    first_scales,
    first_levels,
    first_borders,
    first_starts,
    second,
    second_scales,
    second_levels,
    second_borders,
    second_starts,
    rows,
    cols,
    stride,
    blocks,
    numel,
    lr,
    weight1,
    weight2,
    log2_beta1,
    log2_beta2,
    eps,
    decay,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    t = tl.load(step)
    rows = tl.where(t > 0, rows, 0)  # masks all of a step that is not taken
    there, place, mask, scale_place, scale_mask = tile_of(rows, cols, stride, blocks, numel, BLOCK, ROWS, COLS)
    g = tl.load(gradient + there, mask=mask, other=0).to(tl.float32)
    w = tl.load(weight + there, mask=mask, other=0).to(tl.float32)
    m = load_tile(first, first_scales, first_levels, place, mask, scale_place, scale_mask, FORMAT)
    v = load_tile(second, second_scales, second_levels, place, mask, scale_place, scale_mask, FORMAT)
    m += weight1 * (g - m)
    v += weight2 * (g * g - v)
    store_tile(m, first, first_scales, first_borders, first_starts, place, mask, scale_place, scale_mask, FORMAT)
    store_tile(v, second, second_scales, second_borders, second_starts, place, mask, scale_place, scale_mask, FORMAT)
    correction1 = 1 - tl.exp2(t * log2_beta1)
    correction2 = 1 - tl.exp2(t * log2_beta2)
    w = w * decay - (lr / correction1) * m / (tl.sqrt(v / correction2) + eps)
    tl.store(weight + there, w, mask=mask)
