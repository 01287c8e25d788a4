"""Bytes of optimizer state on a rank: estimated from shapes before a job, measured on the optimizer in one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from muon_dist.forms import Form
from muon_dist.grouping import Assignment
from muon_dist.options import Algorithm, Options
from muon_dist.places import Place, Placed, row_shards
from muon_dist.sharding import local
from muon_dist.state import moments_of, momentum_of

_STEP_BYTES = 4  # AdamW's count of steps, one a parameter, on every rank


def measured_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors of any torch optimizer on this rank."""
    return sum(
        local(value).nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def estimated_state_bytes(
    assignments: Iterable[Assignment], *, shards: int = 1, replicas: int = 1, options: Options | None = None
) -> int:
    """Bytes of optimizer state on the rank that has the most.

    Args:
        assignments: every parameter's algorithm, from :func:`muon_dist.grouping.assign`; only shapes are read, so that
            parameters on the meta device do.
        shards: ranks over which each parameter is sharded by rows; 1 for DDP and a single process.
        replicas: ranks that hold each shard; momentum is shared out among them, AdamW's moments are repeated.
        options: as the optimizer will be given; the defaults if None.
    """
    place = row_shards(shards, replicas)
    return max(state_bytes_by_rank([Placed(a, place) for a in assignments], shards * replicas, options or Options()))


def state_bytes_by_rank(parameters: Iterable[Placed], ranks: int, options: Options) -> list[int]:
    """Bytes of optimizer state on each of the ranks 0 to ``ranks - 1``."""
    total = [0] * ranks
    for (_, shape, form, place), count in _alike(parameters).items():
        for rank, nbytes in enumerate(_of_one(shape, form, place, ranks, options)):
            total[rank] += count * nbytes
    return total


class Part(NamedTuple):
    """What one rank has of each of ``alike`` parameters."""

    algorithm: Algorithm
    shape: tuple[int, ...]
    alike: int
    rank: int
    elements: int


def parts(parameters: Iterable[Placed]) -> Iterator[Part]:
    """What every rank has of the parameters; ranks that have nothing of one may be left out."""
    for (algorithm, shape, _, place), count in _alike(parameters).items():
        for rank, layout in place.moments_layouts(shape, 1):
            yield Part(algorithm, shape, count, rank, math.prod(layout.local_shape))


def _alike(parameters: Iterable[Placed]) -> Counter[tuple[Algorithm, tuple[int, ...], Form | None, Place]]:
    """How many parameters are of one kind in one place: layers repeat, and ranks may be thousands."""
    return Counter((a.algorithm, a.shape, a.form, place) for a, place in parameters)


def _of_one(shape: tuple[int, ...], form: Form | None, place: Place, ranks: int, options: Options) -> list[int]:
    if form is not None:
        found = [0] * ranks
        for rank, layout in place.momentum_layouts(form, options.block_size):
            found[rank] = momentum_of(layout, options).nbytes
        return found
    found = [_STEP_BYTES] * ranks
    for rank, layout in place.moments_layouts(shape, options.block_size):
        found[rank] += sum(moment.nbytes for moment in moments_of(shape, layout, options))
    return found
