"""Rows and columns divided by their norms, for the subspaces that low-rank codecs follow; two passes in one launch.

References: ``_directions`` and ``_unit_columns`` in ``muon_dist/codecs/lowrank.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLS = 1024  # of a row that are read at a time
_TILE = (128, 32)  # rows and columns that are read at a time, of columns


def unit_rows(matrices: Tensor, smallest: float) -> Tensor:
    """Each row divided by its norm, of the same shape and dtype; waves where the norm is below ``smallest``.

    Args:
        matrices: [..., rows, cols], contiguous. The wave of row i is cos(sqrt(i + 1) x) sqrt(2 / cols), for x from 1.
    """
    rows, cols = matrices.shape[-2:]
    out = torch.empty_like(matrices)
    _unit_rows[(matrices.shape[:-1].numel(),)](matrices, out, rows, cols, smallest, (2 / cols) ** 0.5, COLS=_COLS)
    return out


def unit_columns(matrices: Tensor, smallest: float) -> Tensor:
    """Each column divided by its norm, or by ``smallest``, of the same shape and dtype.

    Args:
        matrices: [..., rows, cols], contiguous.
    """
    rows, cols = matrices.shape[-2:]
    out = torch.empty_like(matrices)
    height, width = _TILE
    grid = -(-cols // width), matrices.shape[:-2].numel()
    _unit_columns[grid](matrices, out, rows, cols, smallest, ROWS=height, COLS=width)
    return out


@triton.jit
def _unit_rows(matrices, out, rows, cols, smallest, height, COLS: tl.constexpr):
    index = tl.program_id(0)
    start = index.to(tl.int64) * cols
    squares = tl.zeros((COLS,), tl.float32)
    for first in range(0, cols, COLS):
        col = first + tl.arange(0, COLS)
        x = tl.load(matrices + start + col, mask=col < cols, other=0).to(tl.float32)
        squares += x * x
    norm = tl.sqrt(tl.sum(squares, axis=0))
    missing = norm < smallest
    frequency = tl.sqrt((index % rows + 1).to(tl.float32))
    for first in range(0, cols, COLS):
        col = first + tl.arange(0, COLS)
        x = tl.load(matrices + start + col, mask=col < cols, other=0).to(tl.float32)
        wave = tl.cos(frequency * (col + 1).to(tl.float32)) * height
        tl.store(out + start + col, tl.where(missing, wave, x / tl.where(missing, 1.0, norm)), mask=col < cols)


@triton.jit
def _unit_columns(matrices, out, rows, cols, smallest, ROWS: tl.constexpr, COLS: tl.constexpr):
    start = tl.program_id(1).to(tl.int64) * rows * cols
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    squares = tl.zeros((ROWS, COLS), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & (col < cols)
        x = tl.load(matrices + start + row.to(tl.int64) * cols + col, mask=mask, other=0).to(tl.float32)
        squares += x * x
    norm = tl.sqrt(tl.sum(squares, axis=0, keep_dims=True))
    norm = tl.where(norm < smallest, smallest, norm)  # NaN stays NaN
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        place = start + row.to(tl.int64) * cols + col
        mask = (row < rows) & (col < cols)
        x = tl.load(matrices + place, mask=mask, other=0).to(tl.float32)
        tl.store(out + place, x / norm, mask=mask)
