"""Regions: which part of a whole tensor a rank keeps, and how two such parts overlap. Pure data.

A region is a box of the tensor, as meshes cut it, or a run of its elements in row-major order, as engines with flat
buffers do. A run is a few boxes one behind the other, so any two layouts of a tensor compare as boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class Box(NamedTuple):
    """A box of a tensor: first index and length in every dimension."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    def intersection(self, other: Box) -> Box | None:
        """The box that both contain; None if there is none."""
        firsts = tuple(map(max, self.offset, other.offset))
        stops = (min(a + n, b + m) for a, n, b, m in zip(*self, *other, strict=True))
        size = tuple(stop - first for first, stop in zip(firsts, stops, strict=True))
        return Box(firsts, size) if all(n > 0 for n in size) else None

    def slices_in(self, outer: Box) -> tuple[slice, ...]:
        """The index that cuts this box out of ``outer``, which contains it."""
        starts = (a - b for a, b in zip(self.offset, outer.offset, strict=True))
        return tuple(slice(start, start + n) for start, n in zip(starts, self.size, strict=True))


class Region(NamedTuple):
    """A part of a tensor of ``shape``: the box at ``offset`` of ``size``; where ``flat``, a run of its elements, whose
    start and length are then one number each."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    flat: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of the tensor that holds it: a run is one row."""
        return (1, *self.size) if self.flat else self.size

    def boxes(self) -> list[Box]:
        """The boxes of the whole that it is made of; its elements are theirs, one behind the other."""
        if not self.flat:
            return [Box(self.offset, self.size)]
        (start,), (length,) = self.offset, self.size
        return list(_boxes_of_run(self.shape, start, start + length))


class Cut(NamedTuple):
    """What two regions share, as it lies in the tensor that holds one of them."""

    start: int  # of the box, in the tensor's elements
    size: tuple[int, ...]  # of the box
    slices: tuple[slice, ...]  # in the box

    def of(self, tensor: Tensor) -> Tensor:
        """A view of a contiguous tensor that holds the region."""
        return tensor.view(-1)[self.start : self.start + math.prod(self.size)].view(self.size)[self.slices]


def shared(one: Region, other: Region) -> Iterator[tuple[Cut, Cut]]:
    """What the two have in common, box by box, as it lies in each."""
    for start, box in _placed(one):
        for other_start, other_box in _placed(other):
            if common := box.intersection(other_box):
                yield (
                    Cut(start, box.size, common.slices_in(box)),
                    Cut(other_start, other_box.size, common.slices_in(other_box)),
                )


def _placed(region: Region) -> Iterator[tuple[int, Box]]:
    """The boxes of a region, each with its start in the region's elements."""
    start = 0
    for box in region.boxes():
        yield start, box
        start += math.prod(box.size)


def _boxes_of_run(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Of elements ``start`` to ``stop`` in row-major order: the end of a row, whole rows, the start of a row."""
    if start == stop:
        return
    if len(shape) < 2:
        yield Box((start,) * len(shape), (stop - start,) * len(shape))
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # the whole rows
    if first > last:
        yield from _in_row(shape, last, start, stop)
        return
    if start < first * inner:
        yield from _in_row(shape, first - 1, start, first * inner)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    if last * inner < stop:
        yield from _in_row(shape, last, last * inner, stop)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    origin = row * math.prod(shape[1:])
    for box in _boxes_of_run(shape[1:], start - origin, stop - origin):
        yield Box((row, *box.offset), (1, *box.size))
