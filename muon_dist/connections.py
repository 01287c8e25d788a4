"""What the parameters of a rank have with other ranks: process groups, agreement, plans, and pipelines to run them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist

from muon_dist.agreement import Watch, require_same
from muon_dist.binding import Binding
from muon_dist.groups import GROUP_OPTIONS
from muon_dist.muon import MuonWork
from muon_dist.options import Options
from muon_dist.pipeline import Pipeline
from muon_dist.plan import make_plan
from muon_dist.polar import Schedule
from muon_dist.shards import Shard
from muon_dist.wire import wire_format


class Connections(NamedTuple):
    """Of one binding."""

    pipelines: list[tuple[Pipeline, MuonWork]]
    replicated: list[tuple[list[Shard], Watch]]  # over the same ranks


class ProcessGroups:
    """The optimizer's own process groups, so that its collectives never queue behind the engine's."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def of(self, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        """None for a rank alone. Collective on ``ranks``, the first time."""
        if len(ranks) == 1:
            return None
        if ranks not in self._made:
            self._made[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
        return self._made[ranks]


def connect(
    binding: Binding,
    param_groups: Sequence[dict[str, Any]],
    options: Options,
    schedule: Schedule,
    groups: ProcessGroups,
) -> Connections:
    """Collective. Raises ValueError on every rank if ranks differ in what they must have alike."""
    wire = wire_format(options.wire)
    connections = Connections([], [])
    for ranks, matrices in binding.domains().items():
        group = groups.of(ranks)
        if group is not None:
            shards = [shard for shard in binding.shards if shard.ranks == ranks]
            require_same(_description(shards, param_groups, options), group)
            if replicated := [shard for shard in shards if shard.is_replicated]:
                connections.replicated.append((replicated, Watch(group, binding.device)))
        if matrices:
            plan = make_plan([m.matrix for m in matrices], len(ranks), wire, options.chunk_bytes)
            work = MuonWork(matrices, wire, schedule, options.polar_form, options.polar_dtype)
            connections.pipelines.append((Pipeline(plan, wire, group, binding.device), work))
    return connections


def _description(shards: Sequence[Shard], param_groups: Sequence[dict[str, Any]], options: Options) -> list[str]:
    """What ranks must have alike: options, and parameters with their layouts and groups."""
    of_group = {id(g): {key: g[key] for key in ("algorithm", *GROUP_OPTIONS)} for g in param_groups}
    return [repr(options), *(f"{shard.description} {of_group[id(shard.group)]}" for shard in shards)]
