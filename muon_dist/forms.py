"""Forms: how a parameter is made of matrices. Pure data.

A parameter is seen as a stack of tables, ``[stack, rows, cols]``, and each table is cut between rows into one matrix or
several:

    a weight [m, n]                              one table, one matrix
    query, key and value in one, [q + k + v, n]  one table, three matrices; per head, one a head
    experts [e, m, n]                            e tables
    a convolution [out, in, kh, kw]              one table [out, in * kh * kw]

So a matrix is some rows of one table, and one run of elements of the flattened parameter: whatever part of a parameter
a rank has, it has a rectangle or a run of each matrix in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

from muon_dist.layout import Geometry, Piece, Rect
from muon_dist.names import matches
from muon_dist.regions import Box, Region


class Section(NamedTuple):
    """What a run of a flattened parameter has of one matrix."""

    matrix: int
    start: int  # in the matrix, in elements
    length: int


@dataclass(frozen=True)
class Form:
    """A parameter as matrices, numbered table by table.

    Attributes:
        shape: of the tables, ``[rows, cols]`` or ``[stack, rows, cols]``: what the momentum's shape is.
        splits: rows of the matrices in each table, from the first row to the last.
        transposed: whether inputs are rows and outputs are columns.
    """

    shape: tuple[int, ...]
    splits: tuple[int, ...]
    transposed: bool = False

    @property
    def stack(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def cols(self) -> int:
        return self.shape[-1]

    @property
    def count(self) -> int:
        """Number of matrices."""
        return self.stack * len(self.splits)

    @cached_property
    def _first_rows(self) -> tuple[int, ...]:
        """In its table, of each matrix."""
        return tuple(sum(self.splits[:k]) for k in range(len(self.splits)))

    def rows(self, matrix: int) -> int:
        return self.splits[matrix % len(self.splits)]

    def outputs_and_inputs(self, matrix: int) -> tuple[int, int]:
        """Of the linear map that a matrix stands for."""
        return (self.cols, self.rows(matrix)) if self.transposed else (self.rows(matrix), self.cols)

    def box(self, matrix: int, rect: Rect) -> Box:
        """Where a rectangle of a matrix lies in the tables."""
        table, k = divmod(matrix, len(self.splits))
        return Box((table, self._first_rows[k] + rect.row, rect.col), (1, rect.rows, rect.cols))

    def box_of_run(self, matrix: int, rect: Rect) -> Box:
        """The same for a run of a matrix, which is a rectangle of all of it as one row."""
        table, k = divmod(matrix, len(self.splits))
        first = (table * self.shape[-2] + self._first_rows[k]) * self.cols
        return Box((0, 0, first + rect.col), (1, 1, rect.cols))

    def rects_in(self, box: Box) -> Iterator[tuple[int, Rect]]:
        """What a box of the tables has of each matrix that it has something of."""
        (table, row, col), (tables, height, width) = box
        for k, (first, rows) in enumerate(zip(self._first_rows, self.splits, strict=True)):
            start, stop = max(row, first), min(row + height, first + rows)
            if start < stop and width:
                rect = Rect(start - first, col, stop - start, width)
                yield from ((i * len(self.splits) + k, rect) for i in range(table, table + tables))

    def sections(self, start: int, length: int) -> list[Section]:
        """What a run of the flattened parameter has of each matrix that it has something of, in order."""
        found = []
        table_elements = self.shape[-2] * self.cols
        for table in range(start // table_elements, math.ceil((start + length) / table_elements)) if length else ():
            for k, (row, rows) in enumerate(zip(self._first_rows, self.splits, strict=True)):
                origin = table * table_elements + row * self.cols
                first, stop = max(start, origin), min(start + length, origin + rows * self.cols)
                if first < stop:
                    found.append(Section(table * len(self.splits) + k, first - origin, stop - first))
        return found

    def __str__(self) -> str:
        """Such as "8 of (64x32, 2 of 16x32)"."""
        runs: list[list[int]] = []  # count and rows of equal neighbours
        for rows in self.splits:
            if runs and runs[-1][1] == rows:
                runs[-1][0] += 1
            else:
                runs.append([1, rows])
        shown = ", ".join(
            f"{count} of {rows}x{self.cols}" if count > 1 else f"{rows}x{self.cols}" for count, rows in runs
        )
        if self.stack > 1:
            shown = f"{self.stack} of ({shown})" if len(self.splits) > 1 else f"{self.stack} of {shown}"
        return f"{shown}, transposed" if self.transposed else shown


@dataclass(frozen=True)
class Forms:
    """What users say of the matrices inside parameters; patterns are shell-style, on the whole name.

    Attributes:
        splits: rows of the matrices that a parameter, or each table of a stack, is cut into; by pattern.
        transposed: patterns of parameters that have inputs as rows and outputs as columns.

    Raises:
        ValueError: sizes that are no positive integers.
    """

    splits: Mapping[str, Sequence[int]] = field(default_factory=dict)
    transposed: Sequence[str] = ()

    def __post_init__(self) -> None:
        for pattern, sizes in self.splits.items():
            if isinstance(sizes, int) or not sizes or not all(isinstance(n, int) and n > 0 for n in sizes):
                raise ValueError(f"splits[{pattern!r}]={sizes!r}: it must be rows of each matrix, positive integers")
        if isinstance(self.transposed, str):
            raise ValueError(f"transposed={self.transposed!r}: it must be a list of patterns")

    def of(self, name: str, shape: Sequence[int]) -> Form:
        """The form of a parameter.

        Raises:
            ValueError: no matrix can be made of it, or its splits do not add up to its rows.
        """
        if len(shape) < 2:
            raise ValueError(
                f"{name} has shape {tuple(shape)}; Muon takes matrices (2-D), stacks of them (3-D) and convolutions. "
                f'Give it to AdamW: a group with algorithm="adamw", or overrides={{{name!r}: "adamw"}}'
            )
        tables = tuple(shape) if len(shape) == 2 or is_stack(name, shape) else (shape[0], math.prod(shape[1:]))
        pattern = next((p for p in self.splits if matches(name, p)), None)
        splits = (tables[-2],) if pattern is None else tuple(self.splits[pattern])
        if sum(splits) != tables[-2]:
            raise ValueError(
                f"{name} has shape {tuple(shape)}: {tables[-2]} rows, but splits[{pattern!r}]={splits} add up to "
                f"{sum(splits)}; give the rows of each matrix"
            )
        return Form(tables, splits, any(matches(name, p) for p in self.transposed))


def is_stack(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter of more than two dimensions is a stack of matrices: else it is a convolution."""
    return len(shape) == 3 and (is_expert(name) or "conv" not in name.lower())


def is_expert(name: str) -> bool:
    """Whether a parameter is one of experts, by its name."""
    return "expert" in name.lower()


@lru_cache(maxsize=4096)  # layers repeat
def flat_geometries(form: Form, runs: tuple[tuple[int, int], ...]) -> tuple[Geometry, ...]:
    """The matrices of a parameter of which each rank has one run of elements in row-major order.

    Args:
        runs: start and length of every rank's run; a rank without one has length 0.

    Raises:
        ValueError: the runs overlap, or leave a part of the parameter out.
    """
    covered, numel = 0, math.prod(form.shape)
    for start, length in sorted(run for run in runs if run[1]):
        if start != covered:
            raise ValueError(f"elements {covered} to {start} of {form.shape} lie on no rank or on two")
        covered += length
    if covered != numel:
        raise ValueError(f"{covered} elements lie on the ranks, but {form.shape} has {numel}")
    pieces: list[list[Piece]] = [[] for _ in range(form.count)]
    for rank, (start, length) in enumerate(runs):
        for section in form.sections(start, length):
            pieces[section.matrix].append(Piece(rank, Rect(0, section.start, 1, section.length), (rank,)))
    return tuple(Geometry(form.rows(i), form.cols, tuple(found), flat=True) for i, found in enumerate(pieces))


def as_tables(region: Region) -> Box:
    """A region of a state as a box of the tables; a run is a part of all of them as one row."""
    missing = 3 - len(region.size)
    return Box((0,) * missing + region.offset, (1,) * missing + region.size)
