"""DistMuon: the optimizer that users see. Groups, state and step; the parts it is made of do the work.

A step, for each set of matrices that live on the same ranks (docs/architecture.md has the picture):

1. accumulate: each rank takes its gradient pieces into its momentum pieces, and packs what is to be orthogonalised.
2. gather: an uneven all-to-all brings the pieces of each matrix to its owner; every matrix has one owner in the whole
   job.
3. polar: owners orthogonalise whole matrices, batched by shape.
4. scatter, apply: an all-to-all brings the updates back to where the parameters are.

Chunks of matrices pass through these phases as a pipeline. Everything else trains with AdamW, element-wise on its
shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import finalize

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from muon_dist.binding import Binding, Signature, bind, named, signature, synchronize, tensor_shards
from muon_dist.connections import Connections, ProcessGroups, connect
from muon_dist.describe import describe
from muon_dist.early import Early, require_possible
from muon_dist.forms import Forms
from muon_dist.grouping import Grouping, shape_as_is
from muon_dist.groups import GROUP_OPTIONS, Defaults, resolve_group
from muon_dist.nonfinite import Judge
from muon_dist.options import (
    DEFAULT_BLOCK_SIZE,
    DEFAULT_CHUNK_BYTES,
    AdamWState,
    Algorithm,
    MomentumState,
    Nonfinite,
    Options,
    Polar,
    PolarForm,
    UpdateScale,
    Wire,
)
from muon_dist.plan import Plan
from muon_dist.polar import schedule
from muon_dist.sharding import local
from muon_dist.shards import Shard
from muon_dist.state_dict import loaded, require_matching, require_same_members
from muon_dist.statistics import Observer
from muon_dist.step import Step, current_device


class DistMuon(torch.optim.Optimizer):
    """Muon with sharded, quantised momentum; AdamW for what is no hidden matrix.

    Meshes and placements are read from the parameters: DTensors of FSDP2 and HSDP as they are, plain tensors as
    replicas of each other on all ranks of ``process_group`` (DDP), or as the only copy in a single process.

    Args:
        params: ``model.named_parameters()`` (best: names tell embeddings and heads from matrices),
            ``model.parameters()``, or groups. A group may have ``algorithm="muon" | "adamw"``; one without is split
            by the rules of :mod:`muon_dist.grouping`.
        lr: learning rate of the Muon part.
        momentum: decay of the momentum's moving average.
        nesterov: orthogonalise the Nesterov look-ahead instead of the momentum itself.
        weight_decay: decoupled, times ``lr``.
        update_scale: factor on the orthogonal update of [rows, cols]. "spectral": sqrt(max(1, rows / cols)), learning
            rates about 0.02; "match_rms_adamw": 0.2 sqrt(max(rows, cols)), AdamW's learning rates; "none".
        momentum_state: how the momentum is stored: "fp32", "bf16", "linear8", "dynamic8"; in 4 bits "lowrank4",
            "grasp4", "nf4", "int4". docs/codecs.md compares them.
        block_size: elements of a row that share a scale in the 8-bit and 4-bit states; the side of grasp4's tiles.
        rank_fraction: rank of the low-rank part of "grasp4" and "lowrank4" over the shorter side of a matrix; by
            default 1/16, and what fits in 0.65 bytes an element.
        polar: coefficients of the Newton-Schulz iteration: "doubling", with fewest FLOPs; "polar_express", "jordan",
            "cans", "jiacheng".
        polar_steps: iterations; by default five, of "doubling" its two.
        polar_form: "standard", "gram", or "auto" by shape; of all but "doubling".
        polar_dtype: arithmetic of the iteration; by default fp16 on accelerators and fp32 on CPU.
        wire: how matrices travel to their owners and back: "fp32", "bf16" (fp16 on the way back), "int8", "nf4".
        chunk_bytes: bound on each of the exchange's buffers on a rank (there are four, or two in a single process). A
            matrix that is larger sets the bound itself.
        offload_momentum: keep the momentum of parameters on a GPU in page-locked memory of the host. Kernels read and
            write it there over the bus, while polar factors are computed. It changes no bit of the training, and
            nothing for parameters on the host. What ``state_dict()`` gives then has to be read before the next step.
        adamw_lr, adamw_betas, adamw_eps: of the AdamW part.
        adamw_weight_decay: of embeddings, heads and stacks. Vectors and scalars are not decayed; give them a group with
            ``algorithm="adamw"`` and a ``weight_decay`` if they should be.
        adamw_state: how both of its moments are stored: "fp32" or "dynamic8" (parameters below 4096 elements and
            vectors stay in fp32).
        overrides: ``{name pattern: "muon" | "adamw"}``, before the rules.
        splits: ``{name pattern: rows of each matrix}`` for parameters that are several matrices one below the other,
            such as ``{"*.qkv_proj.weight": (4096, 1024, 1024)}``; of a stack, in each of its tables. Equal parts make
            a matrix of every head.
        transposed: name patterns of parameters with inputs as rows and outputs as columns (GPT-2's Conv1D), for
            ``update_scale="spectral"``.
        nonfinite: what NaN or infinite gradients do: "propagate" as in torch's optimizers; "skip" the step on every
            rank, which ``skipped_steps`` counts; or "raise" on every rank. The latter two change nothing, and look at
            the gradients once more; "raise" also waits for the device, "skip" does not.
        process_group: ranks that hold plain tensors as replicas; the default group where torch.distributed is
            initialised.

    Attributes:
        observer: :class:`muon_dist.statistics.Observer`, statistics of the steps that are made while it is observing.
        skipped_steps: how many steps ``nonfinite="skip"`` left out in this process.

    Raises:
        ValueError, TypeError: an option or a parameter that cannot be; the message names it and the fix.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2e-2,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        update_scale: UpdateScale = "spectral",
        *,
        momentum_state: MomentumState = "linear8",
        block_size: int = DEFAULT_BLOCK_SIZE,
        rank_fraction: float | None = None,
        polar: Polar = "doubling",
        polar_steps: int | None = None,
        polar_form: PolarForm = "auto",
        polar_dtype: torch.dtype | None = None,
        wire: Wire = "bf16",
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        offload_momentum: bool = False,
        adamw_lr: float = 3e-4,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        adamw_state: AdamWState = "fp32",
        overrides: Mapping[str, Algorithm] | None = None,
        splits: Mapping[str, Sequence[int]] | None = None,
        transposed: Sequence[str] = (),
        nonfinite: Nonfinite = "propagate",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        non_member: Any = dist.GroupMember.NON_GROUP_MEMBER
        if process_group is non_member:
            raise ValueError("this rank is not in process_group; construct the optimizer on its members only")
        self._options = Options(
            momentum_state=momentum_state,
            block_size=block_size,
            rank_fraction=rank_fraction,
            polar=polar,
            polar_steps=polar_steps,
            polar_form=polar_form,
            polar_dtype=polar_dtype,
            wire=wire,
            chunk_bytes=chunk_bytes,
            offload_momentum=offload_momentum,
            adamw_state=adamw_state,
            nonfinite=nonfinite,
            forms=Forms(splits or {}, transposed),
        )
        self._schedule = schedule(polar, polar_steps)
        self._overrides = overrides
        self._process_group = process_group
        self._grouping = Grouping()
        self._judge = Judge(nonfinite)
        self.observer = Observer()
        self._early = Early()
        muon = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "update_scale": update_scale,
            "betas": tuple(adamw_betas),
            "eps": adamw_eps,
        }
        self._defaults = Defaults(muon, {**muon, "lr": adamw_lr, "weight_decay": adamw_weight_decay})
        self._bindings: dict[Signature, Binding] = {}
        self._connections: dict[Signature, Connections] = {}
        self._groups = ProcessGroups()
        super().__init__(params, muon)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, split by algorithm where it does not say one."""
        resolved, grouping = resolve_group(
            param_group, self._defaults, self._overrides, self._options.forms, self._whole_shape
        )
        present = {id(p): name for name, p, _ in named(self.param_groups)}
        for assignment in grouping:
            if id(assignment.parameter) in present:
                raise ValueError(
                    f"{assignment.name} is the same tensor as {present[id(assignment.parameter)]} of another group; "
                    f"give each parameter once"
                )
        for group in resolved:
            super().add_param_group(group)
        self._grouping.extend(grouping)

    def bound(self) -> Binding:
        """The parameters as they are now, with their state, for the host to read and write before the next step, and
        found to be alike on all ranks. Collective."""
        self._early.require_finished("what reads or writes the state")
        binding = self._bind()
        self._connect(binding)
        binding.let_host_in()
        return binding

    def grouping(self) -> Grouping:
        """Which parameter goes where, and why; ``print`` it for a table."""
        return self._grouping

    def describe(self) -> str:
        """Groups, codecs, layouts and plans as a readable text, with bytes of this rank. Collective."""
        binding = self.bound()
        domains = (ranks for ranks, matrices in binding.domains().items() if matrices)
        plans = (pipeline.plan for pipeline, _ in self._connect(binding).pipelines)
        return describe(self.param_groups, binding, self._options, list(zip(domains, plans, strict=True)))

    @property
    def options(self) -> Options:
        """What holds for all groups."""
        return self._options

    @property
    def skipped_steps(self) -> int:
        """Steps of this process that NaN or infinite gradients left out. Waits for the device."""
        return self._judge.skipped

    @property
    def plans(self) -> list[Plan]:
        """The plans in use: owners, chunks and loads, one for each set of ranks."""
        return [pipeline.plan for found in self._connections.values() for pipeline, _ in found.pipelines]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters with a gradient. Issues collectives: call it on every rank.

        Raises:
            RuntimeError: gradients were changed after :meth:`during_backward` had read them.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        binding = self._bind()
        connections = self._connect(binding)
        step = self._early.take(binding) or Step(binding, connections, self.observer)
        for shard in binding.shards:
            shard.require_gradient_fits()
        step.present.update(id(shard) for shard in binding.shards if shard.has_gradient)
        for shards, watch in connections.replicated:
            without = frozenset(shard.name for shard in shards if id(shard) not in step.present)
            watch.require_same(without, _NO_GRADIENT)
        for shard in binding.shards:
            shard.settle_gradient()
        with current_device(binding.device):
            step.finish(self._judge.taken(binding, self._groups))
        self._early.finished()
        return loss

    def during_backward(self, *, free_gradients: bool = False) -> AbstractContextManager[None]:
        """Around the last backward pass before ``step()``: the step begins while gradients are still computed.

            with optimizer.during_backward():
                loss.backward()
            optimizer.step()

        The first two chunks of matrices (of ``chunk_bytes``) are taken into the momentum and sent to their owners as
        soon as their gradients are there. Weights change in ``step()`` only. Results are the same bits. Collective.

        - Gradients must be final after this pass: no clipping, no ``GradScaler``, no averaging by hand. Micro-batches
          before it add up as ever, outside. What changes gradients later raises at the next step, naming them.
        - Learning rate and weight decay are read in ``step()``, momentum and ``nesterov`` when a chunk is sent.
        - ``step()`` has to follow on every rank. If the pass raises, what had begun is given up: the momentum of these
          matrices has taken their gradients, weights are as they were, and the next step is like any other.
        - The buffers of the exchange are allocated during the pass.

        Args:
            free_gradients: drop each gradient once it has been read, here and in ``step()``: ``p.grad`` is None then.

        Raises:
            ValueError: gradients are not final or cannot be read during the pass (replicas of plain tensors as under
                DDP, offloaded parameters, engines with flat buffers), or ``nonfinite`` is not "propagate".
            RuntimeError: the last one was not followed by ``step()``, or gradients were changed after it.
        """
        binding = self._bind()
        require_possible(binding, self._options)
        step = Step(binding, self._connect(binding), self.observer, frees=free_gradients)
        return self._early.during_backward(step)

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's; complete from the start, since checkpoints are loaded into what exists."""
        self._early.require_finished("state_dict()")
        self._bind().let_host_in()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of the same codec and layout, dtypes as they were saved: the base class would cast codes to the
        parameters' dtype.

        Raises:
            ValueError: the state was saved with other codecs, shapes or algorithms; nothing is changed.
        """
        self._early.require_finished("load_state_dict()")
        self._bind().let_host_in()
        saved = state_dict["state"]
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        ours = list(named(self.param_groups))
        require_same_members(state_dict["param_groups"], self.param_groups)
        for key, (name, parameter, _) in zip(keys, ours, strict=True):
            require_matching(name, saved.get(key, {}), self.state.get(parameter, {}))
        scalars = {
            key: {k: v for k, v in entries.items() if not isinstance(v, Tensor)} for key, entries in saved.items()
        }
        pinned = {
            parameter: {k: v for k, v in entries.items() if isinstance(v, Tensor) and local(v).is_pinned()}
            for parameter, entries in self.state.items()
        }
        super().load_state_dict({**state_dict, "state": scalars})
        for key, (_, parameter, _) in zip(keys, ours, strict=True):
            for k, v in saved.get(key, {}).items():
                if isinstance(v, Tensor):
                    self.state[parameter][k] = loaded(v, local(parameter).device, pinned[parameter].get(k))
        for group in self.param_groups:
            for option in GROUP_OPTIONS:
                group.setdefault(option, self._defaults.muon[option])
        # The base class put new dictionaries in place of those that the bindings refer to.
        self._bindings.clear()
        self._connections.clear()

    def _whole_shape(self, parameter: Tensor) -> tuple[int, ...]:
        """The shape of a parameter as the model has it. Integrations override it for engines that keep pieces."""
        return shape_as_is(parameter)

    def _shards(self) -> Iterator[Shard]:
        """The trainable parameters as they are now. Integrations override it for engines with buffers of their own."""
        return tensor_shards(named(self.param_groups), self.state, self.process_group)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks of the job, which hold plain tensors as replicas; None for a single process."""
        if self._process_group is None and dist.is_available() and dist.is_initialized():
            return dist.group.WORLD
        return self._process_group

    def _bind(self) -> Binding:
        """The binding to the parameters as they are now. Local."""
        key = signature(self.param_groups)
        if key not in self._bindings:
            self._forget_replaced()
            self._bindings[key] = binding = bind(self.param_groups, self._shards(), self._options)
            if binding.is_offloaded:  # the state must not be freed while kernels use it
                finalize(self, synchronize, binding.device).atexit = False
        return self._bindings[key]

    def _forget_replaced(self) -> None:
        """Drops what belongs to parameters that the groups had before."""
        for binding in self._bindings.values():
            binding.let_host_in()
        self._bindings.clear()
        self._connections.clear()
        present = {id(p) for _, p, _ in named(self.param_groups)}
        for orphan in [p for p in self.state if id(p) not in present]:
            del self.state[orphan]

    def _connect(self, binding: Binding) -> Connections:
        """The connections of a binding. Collective, once for each binding."""
        if binding.signature not in self._connections:
            self._connections[binding.signature] = connect(
                binding, self.param_groups, self._options, self._schedule, self._groups
            )
        return self._connections[binding.signature]


_NO_GRADIENT = (
    "some replicas of parameters had no gradient in the last step while others had one, so they have drifted apart. Go "
    "on from a checkpoint, and reduce gradients over all replicas, zeros where one has none. Without a gradient were"
)
