"""Divides each matrix of a batch by its Frobenius norm, in two passes over memory: one to measure, one to scale.

Reference: ``normalised`` in ``muon_dist/polar/products.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from muon_dist.kernels.compiled import Compiled

_BLOCK = 8192


def normalise(matrices: Tensor, out: Tensor, margin: float, smallest: float, exactly: bool = False) -> Tensor | None:
    """``out[i]`` <- ``matrices[i]`` / (``margin`` ``|matrices[i]|``), in fp32 arithmetic.

    Args:
        matrices, out: [n, rows, cols], contiguous within a matrix, any floating-point types. They may be the same
            memory where their elements are as large.
        smallest: matrices with a smaller norm are divided by this.
        exactly: divide by a power of two instead, for which the norm is between 32 and 64 over ``margin``.

    Returns:
        with ``exactly``, fp32 [n]: by what ``out`` is still to be multiplied.
    """
    n, numel = matrices.shape[0], matrices.shape[1] * matrices.shape[2]
    blocks = -(-numel // _BLOCK)
    parts = torch.empty((2, n, blocks), dtype=torch.float32, device=matrices.device)
    factors, rests = torch.empty((2, n), dtype=torch.float32, device=matrices.device)
    source, target = (matrices, matrices.stride(0)), (out, out.stride(0))
    strides, addresses = (source[1], target[1]), (matrices.data_ptr() % 16, out.data_ptr() % 16)
    key = (n, numel, exactly, strides, addresses, matrices.dtype, out.dtype, matrices.device)
    grid = (blocks, n)
    _MEASURE.launch(key, grid, (*source, parts[0], parts[1], numel, _BLOCK))
    numbers = (blocks, margin, smallest, exactly, 1 << (blocks - 1).bit_length())
    _COMBINE.launch(key, (n, 1), (parts[0], parts[1], factors, rests, *numbers))
    _SCALE.launch(key, grid, (*source, factors, *target, numel, _BLOCK))
    return rests if exactly else None


@triton.jit
def _measure(matrices, stride, largest, squares, numel, BLOCK: tl.constexpr):
    """Of each block the largest magnitude, and the sum of squares relative to it: it neither overflows nor vanishes."""
    matrix = tl.program_id(1).to(tl.int64)
    within = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(matrices + matrix * stride + within, mask=within < numel, other=0).to(tl.float32)
    high = tl.max(tl.abs(values), axis=0)
    relative = values / tl.where(high == 0, 1.0, high)
    place = matrix * tl.num_programs(0) + tl.program_id(0)
    tl.store(largest + place, high)
    tl.store(squares + place, tl.sum(relative * relative, axis=0))


@triton.jit
def _combine(largest, squares, factors, rests, blocks, margin, smallest, EXACTLY: tl.constexpr, BLOCKS: tl.constexpr):
    """The factor of each matrix, or of two factors one that is a power of two. NaN stays NaN: a sum has it even where
    the largest passes it over."""
    matrix = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    high = tl.load(largest + matrix * blocks + block, mask=block < blocks, other=0)
    square = tl.load(squares + matrix * blocks + block, mask=block < blocks, other=0)
    highest = tl.max(high, axis=0)
    relative = high / tl.where(highest == 0, 1.0, highest)
    norm = highest * tl.sqrt(tl.sum(square * relative * relative, axis=0))
    norm = margin * tl.where(norm < smallest, smallest, norm)
    if EXACTLY:
        exponent = norm.to(tl.int32, bitcast=True) >> 23  # and 127
        power = ((127 + 127 + 5 - exponent) << 23).to(tl.float32, bitcast=True)
        tl.store(factors + matrix, power)
        tl.store(rests + matrix, 1 / (norm * power))
    else:
        tl.store(factors + matrix, 1 / norm)


@triton.jit
def _scale(matrices, stride, factors, out, out_stride, numel, BLOCK: tl.constexpr):
    matrix = tl.program_id(1).to(tl.int64)
    within = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = within < numel
    values = tl.load(matrices + matrix * stride + within, mask=mask, other=0).to(tl.float32)
    tl.store(out + matrix * out_stride + within, values * tl.load(factors + matrix), mask=mask)


_MEASURE, _COMBINE, _SCALE = Compiled(_measure), Compiled(_combine), Compiled(_scale)
