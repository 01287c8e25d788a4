"""Pieces in the buffer of their owner as few strips, each unpacked into whole matrices, and packed again, at once.

Row shards come from W ranks as W pieces of one height at one distance in the buffer: a strided view of all of them
costs the launches of one, and where they follow each other without a gap it is the matrix itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from muon_dist.layout import Rect
from muon_dist.plan import Parcel


class Strip(NamedTuple):
    """Pieces that lie side by side in the matrix, are of one size, and are equally far apart in the buffer."""

    first: Parcel
    pieces: int = 1
    axis: int = 0  # of the matrix, along which they follow each other
    stride: int = 0  # bytes from one to the next

    def in_buffer(self, buffer: Tensor, start: int, stop: int) -> Tensor:
        """Their bytes, ``[n, pieces, nbytes]``, for the bundle's matrices from ``start`` to ``stop``."""
        nbytes = self.first.nbytes
        shape, strides = (stop - start, self.pieces, nbytes), (nbytes, self.stride, 1)
        return buffer.as_strided(shape, strides, buffer.storage_offset() + self.first.offset + start * nbytes)

    def of_whole(self, whole: Tensor) -> Tensor:
        """They as a view ``[n, pieces, rows, cols]`` of whole matrices ``[n, *frame]``."""
        row, col, rows, cols = self.first.rect
        if self.axis == 0:
            return whole[:, row : row + self.pieces * rows, col : col + cols].unflatten(1, (self.pieces, rows))
        strip = whole[:, row : row + rows, col : col + self.pieces * cols]
        return strip.unflatten(2, (self.pieces, cols)).transpose(1, 2)

    def in_order(self, pieces: Tensor) -> Tensor:
        """``[n, pieces, rows, cols]`` with its elements in the order of the matrix."""
        return pieces if self.axis == 0 else pieces.transpose(1, 2)


def strips(parcels: Sequence[Parcel]) -> list[Strip]:
    """A bundle's parcels in the buffer's order: one or two strips where rows are cut as torch.chunk cuts them."""
    found: list[Strip] = []
    for parcel in parcels:
        longer = _longer(found[-1], parcel) if found else None
        if longer is not None:
            found[-1] = longer
        else:
            found.append(Strip(parcel))
    return found


def _longer(strip: Strip, parcel: Parcel) -> Strip | None:
    """``strip`` with ``parcel`` behind it, if it fits on."""
    row, col, rows, cols = strip.first.rect
    n = strip.pieces
    stride = strip.stride or parcel.offset - strip.first.offset
    if parcel.offset != strip.first.offset + n * stride:
        return None
    following = {0: Rect(row + n * rows, col, rows, cols), 1: Rect(row, col + n * cols, rows, cols)}
    for axis, rect in following.items():
        if parcel.rect == rect and (n == 1 or axis == strip.axis):
            return Strip(strip.first, n + 1, axis, stride)
    return None
