"""Where parameters will lie, told before there is a job: on a mesh, or as runs of a flat buffer.

What :mod:`muon_dist.shards` reads from parameters, for all ranks at once and without any of them. Forecasts are made of
it; nothing here is used by a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch.distributed.tensor import Replicate, Shard

from muon_dist.forms import Form, flat_geometries
from muon_dist.grouping import Assignment
from muon_dist.layout import Geometry
from muon_dist.sharding import Home, Placements, geometries_of
from muon_dist.state import StateLayout, flat_layout, sharded_layout

_DEVICE = torch.device("meta")


class Place(Protocol):
    """Where one parameter lies. Hashable: layers repeat, and what is computed for one holds for all."""

    def geometries(self, form: Form, turn: int) -> tuple[Geometry, ...]:
        """Of its matrices; ``turn`` says which of several ranks with the same momentum sends them."""

    def momentum_layouts(self, form: Form, block_size: int) -> Iterator[tuple[int, StateLayout]]:
        """Ranks, and how the momentum lies on each; ranks without a part may be left out."""

    def moments_layouts(self, shape: Sequence[int], block_size: int) -> Iterator[tuple[int, StateLayout]]:
        """The same for AdamW's moments, which lie as the parameter does."""


class Placed(NamedTuple):
    """A parameter and its place."""

    assignment: Assignment
    place: Place


@dataclass(frozen=True)
class OnMesh:
    """A tensor of its own, plain or a DTensor, on the ranks 0 to W - 1."""

    home: Home

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # a home of many ranks takes its time
        return hash(self.home)

    def geometries(self, form: Form, turn: int) -> tuple[Geometry, ...]:
        return geometries_of(form, self.home, turn % self.home.momentum_copies)

    def momentum_layouts(self, form: Form, block_size: int) -> Iterator[tuple[int, StateLayout]]:
        return self._layouts(form.shape, self.home.momentum_placements, block_size, form)

    def moments_layouts(self, shape: Sequence[int], block_size: int) -> Iterator[tuple[int, StateLayout]]:
        return self._layouts(shape, self.home.placements, block_size)

    def _layouts(
        self, shape: Sequence[int], placements: Placements, block_size: int, form: Form | None = None
    ) -> Iterator[tuple[int, StateLayout]]:
        for rank in self.home.ranks:
            yield rank, sharded_layout(shape, self.home, placements, rank, block_size, None, _DEVICE, form)


@dataclass(frozen=True)
class InRuns:
    """A flattened parameter of which rank r has the elements ``runs[r]``, given as start and length."""

    runs: tuple[tuple[int, int], ...]

    def geometries(self, form: Form, turn: int) -> tuple[Geometry, ...]:
        return flat_geometries(form, self.runs)

    def momentum_layouts(self, form: Form, block_size: int) -> Iterator[tuple[int, StateLayout]]:
        return self._layouts(form.shape, block_size, form)

    def moments_layouts(self, shape: Sequence[int], block_size: int) -> Iterator[tuple[int, StateLayout]]:
        return self._layouts(shape, block_size)

    def _layouts(
        self, shape: Sequence[int], block_size: int, form: Form | None = None
    ) -> Iterator[tuple[int, StateLayout]]:
        for rank, (start, length) in enumerate(self.runs):
            if length:
                yield rank, flat_layout(shape, start, length, block_size, _DEVICE, form)


def row_shards(shards: int, replicas: int = 1, shares_momentum: bool = True) -> OnMesh:
    """Rows cut over ``shards`` ranks, and ``replicas`` of each shard.

    Args:
        shares_momentum: whether replicas share out the momentum, or each keeps all of it.
    """
    ranks = tuple(range(replicas * shards))
    where = tuple((rank // shards, rank % shards) for rank in ranks)
    placements: Placements = (Replicate(), Shard(0)) if shards > 1 else (Replicate(), Replicate())
    return OnMesh(Home(ranks, (replicas, shards), where, placements, shares_momentum))
