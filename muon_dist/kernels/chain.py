"""A chain of symmetric products in one launch, on Hopper: what one Newton-Schulz segment does to its Gram matrices.

Of each product only the tiles on and below the diagonal are computed, and stored a second time mirrored; of the few
that are not symmetric, all tiles. A tile, 128 x 256, is one turn of a program; there are as many programs as
multiprocessors, and they draw tiles from a queue in which the products follow one another. The tiles of a product need
all of the product before, but only of the same matrix: a program that draws one waits for that matrix alone, while the
others' tiles are still under way, so that a chip is never left to run empty between two products. Tiles are drawn in
order, so what a tile waits for is held by programs that run: none waits for ever, however few programs find room beside
other kernels.

The warps of a program have four jobs:

    loader       draws tiles; copies operands into a ring of STAGES stages, 64 deep
    multipliers  two groups of four warps, with the upper and lower 64 rows of a tile in their registers
    storers      one for each multiplier: copy its results to memory, and count those that have arrived there

A multiplier hands over its results in two halves of 128 columns, as they are and mirrored. They pass through buffers of
its own, into which the loader has put what is to be added (D); the first half's mirror image passes through a stage of
the ring that the loader lends for it. A second matrix to be added (E) is read from memory by the multipliers. Where
what rounding takes off is kept too, which is seldom, buffers are used in turns without a loan; and the sums of X X^T,
which can be of many columns, are put aside in memory now and then. Where rows are scaled for their diagonal elements,
the tiles on the diagonal are computed first, as a product of their own.

Reference: :func:`muon_dist.polar.products.multiply_chain` with plain products. Written in Gluon, Triton's layer for
those who place memory and barriers themselves; it cannot be interpreted on CPU.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from muon_dist.kernels import Chain, chain_takes
from muon_dist.kernels.chain_copies import loader, storer
from muon_dist.kernels.chain_multiplier import multiplier
from muon_dist.kernels.chain_tiles import (
    ALL,
    DEPTH,
    DIAGONAL,
    LAYOUT,
    ROW,
    ROWS_SCALED,
    STAGES,
    SYMMETRIC,
    TILE,
    new_barriers,
)
from muon_dist.kernels.compiled import Compiled

# Tiles of a matrix, more than there are.
_ENDLESS = 2**20


def fits(x: Tensor) -> bool:
    """Whether the kernel can, and should, start a chain from ``x``, [n, s, k]: half precision, whole tiles, Hopper."""
    _, s, k = x.shape
    return chain_takes(s, k, x.dtype) and _multiprocessors(x.device) > 0


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    """Of a Hopper; 0 for others, and for Triton before 3.6, whose Gluon was another."""
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if torch.version.cuda is None or torch.cuda.get_device_capability(device)[0] != 9 or release < (3, 6):
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiply_chain(x: Tensor, chain: Chain, squares: Tensor, factors: Tensor | None = None) -> None:
    """Runs the products of ``chain`` from ``x``, [n, s, k], contiguous or the transpose of such; into ``squares``, its
    slots, [slots, n, s, s] of the same dtype. ``factors``, fp32 [n], are what X and the result are taken times."""
    n, s, k = x.shape
    transposed = x.stride(2) != 1
    operand = [DEPTH.value, TILE.value] if transposed else [TILE.value, DEPTH.value]
    rows = squares.view(-1, s)
    table, scales, tiles = _table(chain, s // TILE.value, transposed, factors is not None, x.device)
    # The queue's next tile, and for each product of each matrix how many parts of it have arrived in memory.
    counts = torch.zeros(1 + len(scales) * n, dtype=torch.int32, device=x.device)
    aside = squares[-2:].view(torch.float32)
    of_rows = torch.empty(n, s, dtype=torch.float32, device=x.device)
    total = n * tiles
    arguments = (
        TensorDescriptor.from_tensor((x.mT if transposed else x).flatten(0, 1), operand, LAYOUT.value),
        TensorDescriptor.from_tensor(rows, [64, 128], LAYOUT.value),
        TensorDescriptor.from_tensor(rows, [128, 64], LAYOUT.value),
        *(squares, aside, table, scales, scales if factors is None else factors, of_rows),
        *(counts, s, k, n, total, transposed),
    )
    key = (n, s, k, total, transposed, x.dtype, x.device)
    # 168 registers a thread on average, of which multipliers take 232.
    _COMPILED.launch(key, (min(total, _multiprocessors(x.device)), 1), arguments, num_warps=4, maxnreg=168)


@lru_cache
def _table(
    chain: Chain, rows: int, transposed: bool, has_factors: bool, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """The products as chain_tiles.py has them; alpha, beta, gamma and diagonal of each; and the tiles of all for a
    matrix of as many ``rows`` of tiles. A product that keeps its diagonal is two here: the first finds it."""
    tiles_of = {
        SYMMETRIC.value: sum(row // 2 + 1 for row in range(rows)),
        DIAGONAL.value: rows,
        ALL.value: rows * ((rows + 1) // 2),
        ROWS_SCALED.value: rows * ((rows + 1) // 2),
    }
    table, scales = [], []
    for index, p in enumerate(chain.products):
        is_last = index == len(chain.products) - 1
        terms = p.terms
        if transposed and not (p.is_symmetric or is_last):  # the next product reads the transpose of what is stored
            terms = [term[::-1] for term in terms]
        factors = [slot or 0 for term in (terms[0], terms[-1]) for slot in term]
        slots = [-1 if slot is None else slot for slot in (p.add, p.also, p.out, p.rest)]
        power = (2 if p.a is None else int(is_last)) if has_factors else 0
        for kind in [DIAGONAL, ROWS_SCALED] if p.keeps_diagonal else [SYMMETRIC if p.is_symmetric else ALL]:
            table.append([p.a is None, len(terms), *factors, *slots, kind.value, power, tiles_of[kind.value]])
            scales.append([p.alpha, p.beta, p.gamma, p.diagonal])
    total = sum(row[-1] for row in table)
    table.append([0] * (ROW.value - 1) + [_ENDLESS])
    numbers = torch.tensor(table, dtype=torch.int32).to(device)
    return numbers, torch.tensor(scales, dtype=torch.float32).to(device), total


@gluon.jit
def _chain(
    x, wide, tall, squares, aside, table, scales, factors, of_rows, counts, s, k, n, total, TRANSPOSED: gl.constexpr
):
    """``wide`` and ``tall`` are the same matrices, the squares, in blocks of [64, 128] and [128, 64]; in their memory
    is also ``aside``, where sums wait, fp32 [n, s, s]. ``of_rows``, by what rows are scaled, is fp32 [n, s]."""
    dtype: gl.constexpr = wide.dtype
    if TRANSPOSED:
        a = gl.allocate_shared_memory(dtype, [STAGES, 64, 128], LAYOUT)
        b = gl.allocate_shared_memory(dtype, [STAGES, 64, 256], LAYOUT)
    else:
        a = gl.allocate_shared_memory(dtype, [STAGES, 128, 64], LAYOUT)
        b = gl.allocate_shared_memory(dtype, [STAGES, 256, 64], LAYOUT)
    results = gl.allocate_shared_memory(dtype, [4, 64, 128], LAYOUT)  # two halves of each multiplier
    tickets = gl.allocate_shared_memory(gl.int32, [4, 32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = new_barriers(STAGES, 1)  # a stage has been loaded, or is lent
    empty = new_barriers(STAGES, 2)  # both multipliers, or storers, are done with it
    added = new_barriers(2, 1)  # D is in a multiplier's results
    handed = new_barriers(6, 1)  # a multiplier's first half, second half, and lent stage are to be stored
    free = new_barriers(4, 1)  # results have been stored
    drawn = new_barriers(4, 1)
    taken = new_barriers(4, 4)
    barriers = (full, empty, added, handed, free, drawn, taken)
    buffers = (a, b, results, tickets)
    geometry = (s, k, n, total)
    memory = (squares, aside, scales, factors, of_rows)
    gl.warp_specialize(
        [
            (multiplier, (memory, table, barriers, buffers, geometry, 0, TRANSPOSED)),
            (multiplier, (memory, table, barriers, buffers, geometry, 1, TRANSPOSED)),
            (loader, (x, wide, tall, table, counts, barriers, buffers, geometry, TRANSPOSED)),
            (storer, (wide, tall, table, counts, barriers, buffers, geometry, 0, TRANSPOSED)),
            (storer, (wide, tall, table, counts, barriers, buffers, geometry, 1, TRANSPOSED)),
        ],
        [4, 1, 1, 1],
        [232, 40, 40, 40],
    )


_COMPILED = Compiled(_chain)
