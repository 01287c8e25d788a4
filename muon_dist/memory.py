"""Bytes of optimizer state on a rank: estimated from shapes before a job, measured on the optimizer in one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

from muon_dist.grouping import Assignment
from muon_dist.options import Options
from muon_dist.sharding import Home, local
from muon_dist.state import moments_of, momentum_of, sharded_layout

_STEP_BYTES = 4  # AdamW's count of steps, one a parameter


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
    options = options or Options()
    ranks = range(replicas * shards)
    where = tuple((rank // shards, rank % shards) for rank in ranks)
    home = Home(tuple(ranks), (replicas, shards), where, (Replicate(), Shard(0)) if shards > 1 else (Replicate(),) * 2)
    cpu = torch.device("cpu")
    total = 0
    for assignment in assignments:
        shape = assignment.shape
        # The first rank's part of every tensor is the largest: rows are cut as torch.chunk cuts them.
        if form := assignment.form:
            layout = sharded_layout(form.shape, home, home.momentum_placements, 0, options.block_size, None, cpu, form)
            total += momentum_of(layout, options).nbytes
        else:
            layout = sharded_layout(shape, home, home.placements, 0, options.block_size, None, cpu)
            total += sum(moment.nbytes for moment in moments_of(shape, layout, options)) + _STEP_BYTES
    return total
