"""Row blocks: each row of a matrix cut into runs of ``block`` elements with one scale each, the last one short."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

# The scales are bf16: the range of fp32 in two bytes, so that a block of 128 costs what a block of 256 costs with
# fp32 scales, at a smaller error. Rounding to nearest moves a scale by at most 2^-8 of itself, less than half a step
# of linear8: the largest element of a block still gets the outermost code, and encoding what was decoded finds the
# same scale again.
SCALE_DTYPE = torch.bfloat16

# A block whose largest magnitude is below this is stored as zeros: 1 / scale would overflow soon after.
SMALLEST_SCALE = 2.0**-100


def block_count(cols: int, block: int) -> int:
    """Blocks in a row."""
    return math.ceil(cols / block)


def to_blocks(values: Tensor, block: int) -> Tensor:
    """``[..., cols]`` as ``[..., blocks, block]``, rows padded with zeros; a view where none is needed."""
    cols = values.shape[-1]
    count = block_count(cols, block)
    padded = functional.pad(values, (0, count * block - cols)) if cols % block else values
    return padded.view(*values.shape[:-1], count, block)


def from_blocks(blocks: Tensor, cols: int) -> Tensor:
    """The inverse of :func:`to_blocks`: ``[..., blocks, block]`` back to ``[..., cols]``."""
    return blocks.flatten(-2)[..., :cols]


def reciprocal(scales: Tensor) -> Tensor:
    """1 / ``scales`` in fp32, and 0 for the scales of blocks that are stored as zeros. NaN stays NaN."""
    wide = scales.float()
    return torch.where(wide.abs() < SMALLEST_SCALE, 0.0, wide.reciprocal())
