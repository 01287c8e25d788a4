"""Symmetric products: alpha A B^T + beta D + diagonal I where the result is known to be symmetric.

Only the tiles on and below the diagonal are computed, and stored a second time mirrored: half the FLOPs of a general
product. Reference: ``symmetric_product`` in ``muon_dist/polar/products.py``. Operands are read and results written
through tensor descriptors, by Hopper's bulk copy engine.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

TILE = 128
_DEPTH = 64
# Below these, cuBLAS is faster: small matrices, and fewer tiles than two for each of the chip's 132 multiprocessors.
SMALLEST_SIDE = 1024
FEWEST_TILES = 256


def fits(a: Tensor) -> bool:
    """Whether the kernel can, and should, multiply ``a``, [n, s, k]: half precision, large, a bulk copy engine."""
    n, s, k = a.shape
    return (
        a.dtype in (torch.float16, torch.bfloat16)
        and s >= SMALLEST_SIDE
        and n * _tiles(s) >= FEWEST_TILES
        and s % 8 == k % 8 == 0  # rows at multiples of 16 bytes
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(a.device)[0] in (9, 10)  # Hopper and Blackwell, with their shared memory
    )


def _tiles(s: int) -> int:
    """Tiles on and below the diagonal."""
    side = -(-s // TILE)
    return side * (side + 1) // 2


def symmetric_product(a: Tensor, b: Tensor, add: Tensor | None, alpha: float, beta: float, diagonal: float) -> Tensor:
    """alpha A B^T + beta D + diagonal I.

    Args:
        a, b: [n, s, k], fp16 or bf16, with a symmetric A B^T; both contiguous, or both transposes of contiguous ones.
        add: D, [n, s, s], symmetric, of the same dtype; None for none.

    Returns:
        [n, s, s] of the same dtype, accumulated in fp32.
    """
    n, s, k = a.shape
    out = a.new_empty((n, s, s))
    result = TensorDescriptor.from_tensor(out, [1, TILE, TILE])
    transposed = a.stride(2) != 1
    block = [1, _DEPTH, TILE] if transposed else [1, TILE, _DEPTH]
    left = TensorDescriptor.from_tensor(a.mT if transposed else a, block)
    right = left if b is a else TensorDescriptor.from_tensor(b.mT if transposed else b, block)
    # Measured: deep pipelines pay for long inner loops only.
    num_warps, num_stages = (8, 5) if k > s else (4, 3)
    _symmetric_product[(_tiles(s), n)](
        left,
        right,
        result if add is None else TensorDescriptor.from_tensor(add, [1, TILE, TILE]),
        result,
        k,
        alpha,
        beta,
        diagonal,
        TRANSPOSED=transposed,
        ADD=add is not None,
        TILE=TILE,
        DEPTH=_DEPTH,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out


@triton.jit
def _symmetric_product(
    a,
    b,
    add,
    out,
    k,
    alpha,
    beta,
    diagonal,
    TRANSPOSED: tl.constexpr,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # Tiles of the lower triangle, row by row: 0 | 1 2 | 3 4 5 | ...
    tile = tl.program_id(0)
    batch = tl.program_id(1)
    i = ((tl.sqrt((8 * tile + 1).to(tl.float32)) - 1) / 2).to(tl.int32)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)  # the root may have been rounded down
    j = tile - i * (i + 1) // 2
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, k, DEPTH):
        if TRANSPOSED:
            left = a.load([batch, start, i * TILE]).reshape(DEPTH, TILE)
            right = b.load([batch, start, j * TILE]).reshape(DEPTH, TILE)
            total = tl.dot(left.T, right, total)
        else:
            left = a.load([batch, i * TILE, start]).reshape(TILE, DEPTH)
            right = b.load([batch, j * TILE, start]).reshape(TILE, DEPTH)
            total = tl.dot(left, right.T, total)
    total *= alpha
    if ADD:
        total += beta * add.load([batch, i * TILE, j * TILE]).reshape(TILE, TILE).to(tl.float32)
    if i == j:
        same = tl.arange(0, TILE)[:, None] == tl.arange(0, TILE)[None, :]
        total += tl.where(same, diagonal, 0.0)
    stored = total.to(out.dtype)
    out.store([batch, i * TILE, j * TILE], stored.reshape(1, TILE, TILE))
    if i != j:
        out.store([batch, j * TILE, i * TILE], stored.T.reshape(1, TILE, TILE))
