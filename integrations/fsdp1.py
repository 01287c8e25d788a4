"""FSDP1: ``FullyShardedDataParallel`` with ``use_orig_params=True``. New code should use FSDP2, which needs no class.

FSDP1 flattens the parameters of a module one behind the other, with padding, and rank r has elements [r n, (r + 1) n)
of that. What it leaves in a parameter is a vector: the rank's run of it, which may be empty. The flat parameter's own
tables say where every parameter starts, so runs are found here and everything else is the core's.

    model = FullyShardedDataParallel(model, auto_wrap_policy=..., use_orig_params=True)
    optimizer = FlatDistMuon(model, lr=2e-2)

Its checkpoints want states of the parameter's size, so ``state_dict`` has them decoded, in fp32; loading encodes them.
:mod:`muon_dist.checkpoint` keeps codes as they are. (On CPU let torch save sharded states only: torch 2.13 gives whole
ones that are all the same memory, those of its own AdamW too.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim.optimizer import ParamsT

from muon_dist.binding import named, tensor_shards
from muon_dist.optimizer import DistMuon
from muon_dist.shards import FlatShard, Shard, TensorShard
from muon_dist.state import FIRST_MOMENT, MOMENTUM, SECOND_MOMENT, STEP_COUNT


class Flattened(NamedTuple):
    """A parameter that FSDP1 manages, and where it lies."""

    shape: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]  # start and length on every rank; none where it is not sharded
    group: dist.ProcessGroup
    device: torch.device


@dataclass(frozen=True)
class RunShard(FlatShard):
    """A run that is a tensor of its own. FSDP1 gives empty ones no gradient; they count steps like the others."""

    @property
    def has_gradient(self) -> bool:
        return self.flat.numel() == 0 or super().has_gradient

    def gradient(self) -> Tensor | None:
        return self.weight() if self.flat.numel() == 0 else super().gradient()


class FlatDistMuon(DistMuon):
    """DistMuon for the parameters of an FSDP1 model.

    With ``HYBRID_SHARD`` every replica of the shards keeps all of the momentum and does all of the work.

    Args:
        model: wrapped with ``use_orig_params=True``.
        params: of it, as DistMuon takes them; by default all of them, with their names.
        options: of :class:`muon_dist.DistMuon`.

    Raises:
        ValueError: the model was wrapped with ``use_orig_params=False``.
    """

    def __init__(self, model: nn.Module, params: ParamsT | None = None, **options: Any) -> None:
        self._places = dict(_places(model))
        super().__init__(model.named_parameters() if params is None else params, **options)

    def during_backward(self, *, free_gradients: bool = False) -> AbstractContextManager[None]:
        """Raises NotImplementedError: FSDP1 hands out gradients when the whole backward pass is done."""
        raise NotImplementedError(
            "during_backward(): FSDP1 hands out gradients when the backward pass is done; leave it out, or shard the "
            "model with fully_shard"
        )

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's, decoded: every state is fp32, of the shape of what FSDP1 leaves in the parameter.

        FSDP1 wants the same states of all parameters that it flattened together: zeros stand for those of the
        algorithm that a parameter does not go to.
        """
        found = super().state_dict()
        keys = _keys(self.param_groups, found)
        found["state"] = {
            keys[id(p)]: {
                STEP_COUNT: torch.zeros((), device=p.device),
                **{label: torch.zeros(p.shape, device=p.device) for label in (MOMENTUM, FIRST_MOMENT, SECOND_MOMENT)},
            }
            for _, p, _ in named(self.param_groups)
            if p.requires_grad and p.numel()
        }
        for shard, stored in self._bind().stored():
            entry = found["state"].get(keys[id(_parameter(shard))])
            if entry is not None:
                entry[stored.label].view(stored.layout.local_shape).copy_(stored.decode(shard.state))
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Encodes what :meth:`state_dict` gives. Collective.

        Raises:
            ValueError: a state is missing or has another size; nothing is changed.
        """
        keys = _keys(self.param_groups, state_dict)
        loaded: dict[tuple[str, str], Tensor] = {}
        for shard, stored in self._bind().stored():
            if _parameter(shard).numel():
                values = state_dict["state"].get(keys[id(_parameter(shard))], {}).get(stored.label, torch.empty(0))
                if values.numel() != stored.layout.region.numel:
                    raise ValueError(
                        f"{shard.name}: the state has {values.numel()} elements of {stored.label}, "
                        f"{stored.layout.region.numel} are expected; load what "
                        f"FullyShardedDataParallel.optim_state_dict_to_load makes for this optimizer"
                    )
                loaded[shard.name, stored.label] = values
        super().load_state_dict({**state_dict, "state": {}})
        counts: dict[dist.ProcessGroup, list[Tensor]] = {}
        for shard, stored in self._bind().stored():
            values = loaded.get((shard.name, stored.label))
            if values is not None:
                values = values.to(stored.layout.device, torch.float32).reshape(stored.layout.local_shape)
                stored.encode(values, stored.buffers(shard.state))
            if stored.label == STEP_COUNT and isinstance(shard, RunShard):
                counts.setdefault(self._places[shard.flat].group, []).append(stored.buffers(shard.state)[""])
        for group, steps in counts.items():  # ranks with an empty run got none
            everyones = torch.stack(steps)
            dist.all_reduce(everyones, op=dist.ReduceOp.MAX, group=group)
            torch._foreach_copy_(steps, list(everyones))

    def _whole_shape(self, parameter: Tensor) -> tuple[int, ...]:
        return self._places[parameter].shape if parameter in self._places else super()._whole_shape(parameter)

    def _shards(self) -> Iterator[Shard]:
        for name, p, group in named(self.param_groups):
            place = self._places.get(p)
            if place is None or not place.runs:
                process_group = self.process_group if place is None else place.group
                yield from tensor_shards([(name, p, group)], self.state, process_group, share_momentum=False)
            elif p.requires_grad:
                index = place.group.rank()
                if p.shape != (place.runs[index][1],):
                    raise ValueError(
                        f"{name} has shape {tuple(p.shape)}, but this rank's part of it {place.runs[index][1]} "
                        f"elements: FSDP has gathered it. Use the optimizer after backward and outside of "
                        f"summon_full_params"
                    )
                yield RunShard(
                    name=name,
                    shape=place.shape,
                    group=group,
                    state=self.state[p],
                    prefix="",
                    ranks=tuple(dist.get_process_group_ranks(place.group)),
                    device=place.device,
                    flat=p,
                    offset=0,
                    runs=place.runs,
                    index=index,
                )


def _places(model: nn.Module) -> Iterator[tuple[Tensor, Flattened]]:
    """Where the parameters that FSDP1 manages lie."""
    for module in FullyShardedDataParallel.fsdp_modules(model):
        handle: Any = module._handle
        if handle is None:
            continue
        flat = handle.flat_param
        if not handle._use_orig_params:
            raise ValueError(
                f"{', '.join(flat._fqns)}: FSDP has put them into one parameter, in which the optimizer finds no "
                f"matrices; wrap the model with FullyShardedDataParallel(..., use_orig_params=True)"
            )
        length = flat._sharded_size.numel()
        starts, start = [], 0
        for numel, is_padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
            if not is_padding:
                starts.append(start)
            start += numel
        for p, shape, start in zip(flat._params, flat._shapes, starts, strict=True):
            ranks = range(handle.world_size) if handle.uses_sharded_strategy else ()
            runs = tuple(_run(shape.numel(), rank * length - start, length) for rank in ranks)
            yield p, Flattened(tuple(shape), runs, handle.process_group, handle.device)


def _run(numel: int, start: int, length: int) -> tuple[int, int]:
    """Start and length of what elements ``start`` to ``start + length`` have of a parameter's ``numel``."""
    first, stop = max(start, 0), min(start + length, numel)
    return (first, stop - first) if first < stop else (0, 0)


def _keys(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> dict[int, Any]:
    """The keys of the parameters in a state, by the parameters' identity."""
    saved = [key for group in state_dict["param_groups"] for key in group["params"]]
    return {id(p): key for (_, p, _), key in zip(named(groups), saved, strict=True)}


def _parameter(shard: Shard) -> Tensor:
    """The one that a shard was made of."""
    if isinstance(shard, TensorShard):
        return shard.parameter
    assert isinstance(shard, RunShard)
    return shard.flat
