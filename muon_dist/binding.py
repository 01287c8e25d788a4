"""Binds the optimizer to its parameters as they are now: where each lives, and where its state lies.

Trainers swap, cast and re-shard parameters after the optimizer was made, so nothing about a parameter is read at
construction. A signature of all of them is compared at every step, and everything is bound anew when it changed.
Binding is local: no collective is issued.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from muon_dist.adamw import AdamWParameter
from muon_dist.layout import Matrix
from muon_dist.muon import MuonParameter
from muon_dist.options import Options
from muon_dist.sharding import Home, geometry_of, home_of, rect_of, unsupported_placement
from muon_dist.state import moments_of, momentum_of

ParamGroups = Sequence[dict[str, Any]]
Signature = tuple[Any, ...]


@dataclass(frozen=True)
class Binding:
    """All trainable parameters, by algorithm, in the order of the groups; and the home of each of them."""

    signature: Signature
    muon: tuple[MuonParameter, ...]
    adamw: tuple[AdamWParameter, ...]
    device: torch.device  # of all of them on this rank
    homes: dict[int, Home]  # by id() of the parameter

    def update_adamw(self) -> None:
        """The AdamW part of a step. Local."""
        for p in self.adamw:
            p.update()

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Names and parameters, those of Muon first."""
        yield from ((p.matrix.name, p.parameter) for p in self.muon)
        yield from ((p.name, p.parameter) for p in self.adamw)


def named(groups: ParamGroups) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """Name, parameter and group of every parameter; a position stands in for a name that is not known."""
    position = 0
    for group in groups:
        names = group.get("param_names") or [f"parameter {position + i}" for i in range(len(group["params"]))]
        for name, parameter in zip(names, group["params"], strict=True):
            yield name, parameter, group
        position += len(group["params"])


def signature(groups: ParamGroups) -> Signature:
    """What must be the same for a binding to hold."""
    return tuple(
        (id(p), p.shape, p.dtype, p.device, p.requires_grad, p.placements if isinstance(p, DTensor) else None)
        for group in groups
        for p in group["params"]
    )


def bind(
    groups: ParamGroups,
    state: MutableMapping[Tensor, Any],
    options: Options,
    process_group: dist.ProcessGroup | None,
) -> Binding:
    """Reads where every trainable parameter lives, and creates the state that is missing.

    Args:
        process_group: the ranks that hold plain (not distributed) tensors as replicas; None for a single process.

    Raises:
        ValueError: a parameter lives where the optimizer cannot follow, named with the reason.
    """
    ranks = dist.get_process_group_ranks(process_group) if process_group is not None else [0]
    replica_meshes: dict[str, DeviceMesh] = {}
    muon: list[MuonParameter] = []
    adamw: list[AdamWParameter] = []
    homes: dict[int, Home] = {}
    for name, p, group in named(groups):
        if not p.requires_grad:
            continue
        if reason := unsupported_placement(p):
            raise ValueError(f"{name}: {reason}")
        home = homes[id(p)] = home_of(p, sorted(ranks))
        rank = home.ranks.index(dist.get_rank()) if len(home.ranks) > 1 else 0
        mesh = p.device_mesh if isinstance(p, DTensor) else None
        if group["algorithm"] == "muon":
            if home.repeats_momentum:
                raise ValueError(
                    f"{name} is sharded in both dimensions and replicated besides ({home.placements}), which Muon does "
                    f"not support; give it to AdamW or replicate it over one mesh dimension less"
                )
            rows, cols = p.shape
            if mesh is None and process_group is not None and process_group.size() > 1:
                mesh = replica_meshes.setdefault(p.device.type, DeviceMesh.from_group(process_group, p.device.type))
            muon.append(
                MuonParameter(
                    matrix=Matrix(name, geometry_of(rows, cols, home)),
                    parameter=p,
                    group=group,
                    state=state[p],
                    momentum=momentum_of((rows, cols), home, rank, options, mesh, p.device),
                    stored=rect_of(rows, cols, home, home.placements, rank),
                )
            )
        else:
            first, second = moments_of(tuple(p.shape), home, rank, options, mesh, p.device)
            adamw.append(AdamWParameter(name, p, group, state[p], exp_avg=first, exp_avg_sq=second))
    bound: list[MuonParameter | AdamWParameter] = [*muon, *adamw]
    for parameter in bound:
        parameter.create_state()
    return Binding(signature(groups), tuple(muon), tuple(adamw), _common_device(groups), homes)


def _common_device(groups: ParamGroups) -> torch.device:
    """The device of all trainable parameters of this rank. Raises ValueError where there are several."""
    devices = {p.device: name for name, p, _ in named(groups) if p.requires_grad}
    if len(devices) > 1:
        raise ValueError(f"parameters of one rank lie on several devices, such as {devices}; move them to one")
    return next(iter(devices), torch.device("cpu"))
