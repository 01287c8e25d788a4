"""Matrices and pieces: which rank holds which rectangle of which matrix. Pure data, no tensors, no process group.

A *matrix* is one 2-D thing to orthogonalise; a *piece* is a rectangle of it on one rank. Two lists say all that the
rest of the optimizer needs of a layout, whatever engine made it:

- ``held``: the pieces whose momentum a rank keeps. They are disjoint and cover the matrix once over all ranks.
- ``wanted``: the pieces of the update that a rank applies to its parameter. They cover the matrix once per replica.

Under FSDP2 both lists are the same row blocks. Under DDP a rank holds a slice of the rows and wants them all; under
HSDP it holds a slice of the columns of its row block and wants the whole block. Ranks are numbered within the process
group that exchanges the matrix, from 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Rect(NamedTuple):
    """A rectangle of a matrix: first row, first column, number of rows, number of columns."""

    row: int
    col: int
    rows: int
    cols: int

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def slices(self) -> tuple[slice, slice]:
        """The index that cuts this rectangle out of the whole matrix."""
        return slice(self.row, self.row + self.rows), slice(self.col, self.col + self.cols)

    def relative_to(self, origin: Rect) -> Rect:
        """The same rectangle, counted from the corner of ``origin``."""
        return Rect(self.row - origin.row, self.col - origin.col, self.rows, self.cols)


class Piece(NamedTuple):
    """A rectangle of a matrix on one rank."""

    rank: int
    rect: Rect


class Geometry(NamedTuple):
    """Shape of a matrix and its pieces, ordered by rank. Matrices of equal geometry are batched."""

    rows: int
    cols: int
    held: tuple[Piece, ...]
    wanted: tuple[Piece, ...]


@dataclass(frozen=True)
class Matrix:
    """One matrix to orthogonalise, by the name of its parameter."""

    name: str
    geometry: Geometry


def chunk_range(size: int, parts: int, index: int) -> tuple[int, int]:
    """Start and length of part ``index`` when ``size`` is cut as ``torch.chunk`` cuts: equal ceil-sized parts, the last
    ones short or empty."""
    length = math.ceil(size / parts)
    start = min(size, length * index)
    return start, min(length, size - start)


def aligned_block(cols: int, cuts: Sequence[int], block_size: int) -> int:
    """Block length for quantising rows of ``cols`` elements so that no block crosses a cut between two ranks.

    ``cuts`` are the columns at which pieces start. Without a cut the block is ``block_size`` and only the last block
    of a row is short. With cuts it is the divisor of their distance nearest to ``block_size``, on a log scale: blocks
    then lie wholly on one rank and a DTensor of scales shards at the same places as the codes.
    """
    distance = math.gcd(*cuts) if cuts else 0
    if distance == 0:
        return min(block_size, max(cols, 1))
    divisors = [d for d in range(1, distance + 1) if distance % d == 0]
    return min(divisors, key=lambda d: (abs(math.log(d / block_size)), -d))
