"""Binds the optimizer to its parameters as they are now: where each lives, and where its state lies.

Trainers swap, cast and re-shard parameters after the optimizer was made, so nothing about a parameter is read at
construction. A signature of all of them is compared at every step, and everything is bound anew when it changed.
Binding is local: no collective is issued.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from muon_dist.adamw import AdamWParameter, update_all
from muon_dist.muon import MuonMatrix, MuonParameter
from muon_dist.options import Options
from muon_dist.shards import Shard, TensorShard
from muon_dist.state import StoredTensor

ParamGroups = Sequence[dict[str, Any]]
Signature = tuple[Any, ...]


@dataclass(frozen=True)
class Binding:
    """All trainable parameters, by algorithm, in the order of the groups."""

    signature: Signature
    shards: tuple[Shard, ...]
    muon: tuple[MuonParameter, ...]
    adamw: tuple[AdamWParameter, ...]
    device: torch.device  # where all of them are computed on this rank

    def update_adamw(self, taken: Tensor | None) -> None:
        """The AdamW part of a step. Local.

        Args:
            taken: a bool on the device, whether anything changes; None: it does.
        """
        with record_function("muon_dist.adamw"):
            update_all(self.adamw, self.device, taken)

    @cached_property
    def is_offloaded(self) -> bool:
        """Whether kernels read and write state in page-locked memory of the host."""
        return any(p.momentum.layout.pinned for p in self.muon)

    def let_host_in(self) -> None:
        """Waits until kernels are done with state on the host, which may then be read, written or freed there."""
        if self.is_offloaded:
            synchronize(self.device)

    def stored(self) -> Iterator[tuple[Shard, StoredTensor]]:
        """All state of this rank, with the parameter that each is of."""
        for p in self.muon:
            yield p.shard, p.momentum
        for q in self.adamw:
            yield from ((q.shard, stored) for stored in (q.exp_avg, q.exp_avg_sq, q.step))

    def domains(self) -> dict[tuple[int, ...], list[MuonMatrix]]:
        """The matrices by the ranks that exchange them, in an order that is the same on all; every rank's own sets of
        ranks are there, also those without a matrix."""
        found: dict[tuple[int, ...], list[MuonMatrix]] = {r: [] for r in sorted({s.ranks for s in self.shards})}
        for p in self.muon:
            found[p.shard.ranks].extend(p.matrices)
        return found


def named(groups: ParamGroups) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
    """Name, parameter and group of every parameter; a position stands in for a name that is not known."""
    position = 0
    for group in groups:
        names = group.get("param_names", ())
        if len(names) != len(group["params"]):  # none, or an engine's buffers are in the parameters' place
            names = [f"parameter {position + i}" for i in range(len(group["params"]))]
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


def tensor_shards(
    entries: Iterable[tuple[str, Tensor, dict[str, Any]]],
    state: MutableMapping[Tensor, Any],
    process_group: dist.ProcessGroup | None,
    share_momentum: bool = True,
) -> Iterator[Shard]:
    """The trainable ones of ``entries`` (name, parameter, group), each of them a tensor of its own.

    Args:
        process_group: the ranks that hold plain (not distributed) tensors as replicas; None for a single process.
        share_momentum: whether they share out the momentum, as DTensors, or each keeps all of it as plain tensors.

    Raises:
        ValueError: a parameter lives where the optimizer cannot follow, named with the reason.
    """
    ranks = tuple(sorted(dist.get_process_group_ranks(process_group))) if process_group is not None else (0,)
    meshes: dict[str, DeviceMesh] = {}
    for turn, (name, p, group) in enumerate(entries):
        if p.requires_grad:
            if share_momentum and process_group is not None and len(ranks) > 1 and not isinstance(p, DTensor):
                meshes.setdefault(p.device.type, DeviceMesh.from_group(process_group, p.device.type))
            yield TensorShard.of(name, p, group, state[p], ranks, meshes.get(p.device.type), turn)


def bind(groups: ParamGroups, shards: Iterable[Shard], options: Options) -> Binding:
    """Creates the state that is missing.

    Raises:
        ValueError: Muon cannot take a parameter as it lies, named with the reason.
    """
    shards = tuple(shards)
    muon = tuple(MuonParameter.of(shard, options) for shard in shards if shard.group["algorithm"] == "muon")
    adamw = tuple(AdamWParameter.of(shard, options) for shard in shards if shard.group["algorithm"] == "adamw")
    bound: list[MuonParameter | AdamWParameter] = [*muon, *adamw]
    for parameter in bound:
        parameter.create_state()
    return Binding(signature(groups), shards, muon, adamw, _common_device(shards))


def synchronize(device: torch.device) -> None:
    """Waits for all streams of ``device``."""
    torch.get_device_module(device).synchronize(device)


def _common_device(shards: Iterable[Shard]) -> torch.device:
    """Raises ValueError where there are several."""
    devices = {shard.device: shard.name for shard in shards}
    if len(devices) > 1:
        raise ValueError(f"parameters of one rank lie on several devices, such as {devices}; move them to one")
    return next(iter(devices), torch.device("cpu"))
