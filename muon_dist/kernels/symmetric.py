"""Symmetric products: alpha A B^T + beta D + diagonal I where the result is known to be symmetric.

Only the tiles on and below the diagonal are computed, and stored a second time mirrored: half the FLOPs of a general
product. Reference: ``symmetric_product`` in ``muon_dist/polar/products.py``. Operands are read and results written
through tensor descriptors, by the bulk copy engine of Hopper and Blackwell. On Hopper, chain.py does whole chains of
such products at once; this kernel does what does not fit it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from muon_dist.kernels.compiled import Compiled

TILE = 128
_DEPTH = 64
# Below these, cuBLAS is faster: small matrices, and fewer tiles than two for each of the chip's 132 multiprocessors.
SMALLEST_SIDE = 1024
FEWEST_TILES = 256
# Inner loops are long from this many columns on.
_LONG_FROM = 2048
# From this many rows on, what is read of the operands counts, and wider tiles read less.
_WIDE_FROM = 8192


class _Launch(NamedTuple):
    """How a product is cut into tiles.

    Attributes:
        width: columns of a tile; its rows are ``TILE``.
        stages: of the pipeline.
        tiles: on and below the diagonal of a matrix.
        programs: as many as tiles, or fewer that take tiles in turn.
    """

    width: int
    stages: int
    tiles: int
    programs: int

    @classmethod
    @lru_cache
    def of(cls, n: int, s: int, k: int, adds: bool, device: torch.device) -> _Launch:
        """Measured on an H200. Wide tiles pay where the epilogue has much to do; taking turns hides an epilogue behind
        the next tile's loads, and costs where inner loops are long."""
        wide = adds or s >= _WIDE_FROM
        width, stages = (2 * TILE, 3) if wide else (TILE, 5)
        tiles = _tiles(s, width)
        programs = n * tiles
        if device.type == "cuda" and (wide or k <= _LONG_FROM):
            programs = min(programs, torch.cuda.get_device_properties(device).multi_processor_count)
        return cls(width, stages, tiles, programs)


def fits(a: Tensor) -> bool:
    """Whether the kernel can, and should, multiply ``a``, [n, s, k]: half precision, large, a bulk copy engine."""
    n, s, k = a.shape
    return (
        a.dtype in (torch.float16, torch.bfloat16)
        and s >= SMALLEST_SIDE
        and n * _tiles(s, TILE) >= FEWEST_TILES
        and s % 8 == k % 8 == 0  # rows at multiples of 16 bytes
        and _has_bulk_copies(a.device)
    )


@lru_cache
def _has_bulk_copies(device: torch.device) -> bool:
    """Hopper and Blackwell, with their shared memory."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _tiles(s: int, width: int) -> int:
    """Tiles on and below the diagonal. Tiles that are ``width / TILE`` times as wide as high come in as many rows
    for each block of ``width`` columns, and those of the last block cross the diagonal."""
    blocks = -(-s // width)
    return width // TILE * blocks * (blocks + 1) // 2


def symmetric_product(
    a: Tensor, b: Tensor, add: Tensor | None, alpha: float, beta: float, diagonal: float, out: Tensor
) -> None:
    """alpha A B^T + beta D + diagonal I, accumulated in fp32.

    Args:
        a, b: [n, s, k], fp16 or bf16, with a symmetric A B^T; both contiguous, or both transposes of contiguous ones.
        add: D, [n, s, s], symmetric, of the same dtype; None for none. It may be ``out``: a tile of D is read before
            the same tile is stored, and where mirror images are stored D is not read.
        out: [n, s, s], contiguous, of the same dtype; none of the factors.
    """
    n, s, k = a.shape
    adds, transposed = add is not None, a.stride(2) != 1
    launch = _Launch.of(n, s, k, adds, a.device)
    result = TensorDescriptor.from_tensor(out, [1, TILE, TILE])

    def operand(x: Tensor, side: int) -> TensorDescriptor:
        block = [1, _DEPTH, side] if transposed else [1, side, _DEPTH]
        return TensorDescriptor.from_tensor(x.mT if transposed else x, block)

    left = operand(a, TILE)
    right = left if b is a and launch.width == TILE else operand(b, launch.width)
    added = result if add is None else TensorDescriptor.from_tensor(add, [1, TILE, launch.width])
    arguments = (
        *(left, right, added, result, k, launch.tiles, n * launch.tiles, float(alpha), float(beta), float(diagonal)),
        *(transposed, adds, TILE, launch.width, _DEPTH),
    )
    key = (n, s, k, adds, transposed, a.dtype, a.device)
    _COMPILED.launch(key, (launch.programs, 1), arguments, num_warps=8, num_stages=launch.stages)


@triton.jit
def _symmetric_product(
    a,
    b,
    add,
    out,
    k,
    tiles,
    total,
    alpha,
    beta,
    diagonal,
    TRANSPOSED: tl.constexpr,
    ADD: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        batch = tile // tiles
        i, j, crosses = _place(tile % tiles, WIDTH // HEIGHT)
        sums = tl.zeros((HEIGHT, WIDTH), tl.float32)
        for start in range(0, k, DEPTH):
            if TRANSPOSED:
                left = a.load([batch, start, i * HEIGHT]).reshape(DEPTH, HEIGHT)
                right = b.load([batch, start, j * WIDTH]).reshape(DEPTH, WIDTH)
                sums = tl.dot(left.T, right, sums)
            else:
                left = a.load([batch, i * HEIGHT, start]).reshape(HEIGHT, DEPTH)
                right = b.load([batch, j * WIDTH, start]).reshape(WIDTH, DEPTH)
                sums = tl.dot(left, right.T, sums)
        sums *= alpha
        if ADD:
            sums += beta * add.load([batch, i * HEIGHT, j * WIDTH]).reshape(HEIGHT, WIDTH).to(tl.float32)
        if crosses:
            same = (i * HEIGHT + tl.arange(0, HEIGHT))[:, None] == (j * WIDTH + tl.arange(0, WIDTH))[None, :]
            sums += tl.where(same, diagonal, 0.0)
        if WIDTH == HEIGHT:
            _store(out, sums, batch, i * HEIGHT, j * WIDTH, crosses, HEIGHT)
        else:
            first, second = sums.reshape(HEIGHT, 2, HEIGHT).permute(0, 2, 1).split()
            _store(out, first, batch, i * HEIGHT, j * WIDTH, crosses, HEIGHT)
            _store(out, second, batch, i * HEIGHT, j * WIDTH + HEIGHT, crosses, HEIGHT)


@triton.jit
def _place(tile, RATIO: tl.constexpr):
    """Row and column of a tile in its matrix, counted in tiles, and whether it crosses the diagonal.

    Tiles are counted row by row, 0 | 1 2 | 3 4 5 | ..., where a row of square tiles stands for RATIO rows of wide ones.
    """
    pair = tile // RATIO
    g = ((tl.sqrt((8 * pair + 1).to(tl.float32)) - 1) / 2).to(tl.int32)
    g = tl.where((g + 1) * (g + 2) // 2 <= pair, g + 1, g)  # the root may have been rounded down
    within = tile - RATIO * (g * (g + 1) // 2)
    j = within % (g + 1)
    return RATIO * g + within // (g + 1), j, j == g


@triton.jit
def _store(out, sums, batch, row, col, crosses, SIDE: tl.constexpr):
    """Stores a square, and its mirror image where that is not part of another tile."""
    stored = sums.to(out.dtype)
    out.store([batch, row, col], stored.reshape(1, SIDE, SIDE))
    if not crosses:
        out.store([batch, col, row], stored.T.reshape(1, SIDE, SIDE))


_COMPILED = Compiled(_symmetric_product)
