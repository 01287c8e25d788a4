"""Matrices and pieces: which rank holds which rectangle of which matrix. Pure data, no tensors, no process group.

A *matrix* is one 2-D thing to orthogonalise; a *piece* is a rectangle of it whose momentum one rank holds. The pieces
of a matrix are disjoint and cover it, and each is wanted by the ranks that have this part of the parameter: that says
all that the rest of the optimizer needs of a layout, whatever engine made it.

Under FSDP2 pieces are row blocks, each wanted by its holder alone. Under DDP they are row blocks too, each wanted by
all ranks. Under HSDP they are slices of the columns of row blocks, each wanted by the replicas of its row block. Under
ZeRO they are runs of the flattened matrix, which start and end anywhere in a row.
Ranks are numbered within the process group that exchanges the matrix, from 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
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


class Piece(NamedTuple):
    """A rectangle of a matrix: the rank that holds its momentum, and the ranks that apply its update, ascending.

    Where the momentum is repeated, ``kept_by`` are the others, among those that want it, that keep it too: one rank
    sends it for all.
    """

    rank: int
    rect: Rect
    wanted_by: tuple[int, ...]
    kept_by: tuple[int, ...] = ()


@dataclass(frozen=True, order=True)
class Geometry:
    """Shape of a matrix and its pieces, ordered by rank. Matrices of equal geometry are batched.

    There are few of them in a model, each with a piece a rank: what takes a walk over the pieces is kept.
    """

    rows: int
    cols: int
    pieces: tuple[Piece, ...]
    flat: bool = False  # the pieces are runs of the flattened matrix

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.rows, self.cols, self.pieces, self.flat))

    @property
    def frame(self) -> tuple[int, int]:
        """Shape of what the pieces are rectangles of: the matrix, or all of it as one row."""
        return (1, self.rows * self.cols) if self.flat else (self.rows, self.cols)

    @cached_property
    def replicated(self) -> bool:
        """Whether updates go to more ranks than those that hold the momentum."""
        return any(piece.wanted_by != (piece.rank,) for piece in self.pieces)

    @cached_property
    def main_holder(self) -> int | None:
        """The rank that holds more than two thirds of the matrix, if there is one."""
        enough = self.rows * self.cols * 2 / 3
        return next((piece.rank for piece in self.pieces if piece.rect.numel > enough), None)


@lru_cache(maxsize=4096)
def held_by(rank: int, geometry: Geometry) -> tuple[Piece, ...]:
    """The pieces that a rank holds; cached, since layers repeat."""
    return tuple(piece for piece in geometry.pieces if piece.rank == rank)


@lru_cache(maxsize=4096)
def wanted_by(rank: int, geometry: Geometry) -> tuple[Piece, ...]:
    """The pieces that a rank wants; cached, since layers repeat."""
    return tuple(piece for piece in geometry.pieces if rank in piece.wanted_by)


class Extent(NamedTuple):
    """A matrix and the largest of the parts that it lies in: what codecs that look at whole parts are made for.

    Attributes:
        matrix: rows and columns of the whole.
        part: rows and columns of the largest part on any rank; of a run, as it is when folded at the matrix's width.
        cuts: into how many parts the rows and the columns are cut.
        run: whether parts are runs of the flattened matrix.
    """

    matrix: tuple[int, int]
    part: tuple[int, int]
    cuts: tuple[int, int] = (1, 1)
    run: bool = False


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


def extent_of_run(shape: Sequence[int], length: int) -> Extent | None:
    """Of a run of a flattened parameter of ``shape``; None for what is no matrix."""
    if len(shape) != 2:
        return None
    rows, cols = shape
    return Extent((rows, cols), (math.ceil(length / cols), cols), run=True)


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
