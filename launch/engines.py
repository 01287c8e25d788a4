"""The engines behind the one face that the training loop sees; here torch's own: FSDP2, DDP and a single process."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import LlamaForCausalLM

from muon_dist import DistMuon
from muon_dist.checkpoint.background import on_host
from muon_dist.integrations.fsdp import data_parallel_mesh, no_gradient_sync, shard_transformer
from muon_dist.launch.config import TrainConfig
from muon_dist.launch.environment import Environment
from muon_dist.launch.models import transformer_blocks
from muon_dist.launch.optimizers import build_optimizers, expected_state_bytes, warmup_cosine

Context = Callable[[], AbstractContextManager[object]]
Write = Callable[[Path, dist.ProcessGroup | None], None]  # into a folder; the ranks that do it together


class Engine(ABC):
    """A model on its ranks, with what updates it."""

    model: nn.Module  # called in forward passes
    optimizers: Sequence[Optimizer]  # what holds the state and the learning rates
    precision: Context = nullcontext  # around every forward pass
    expected_state_bytes: int | None = None  # on the fullest rank, where it can be told from shapes

    @abstractmethod
    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Around the forward and backward pass of each of a step's micro-batches, whose gradients add up."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch's mean loss to those of the step's mean loss."""

    @abstractmethod
    def step(self) -> Tensor | float:
        """Clips the raw gradients, updates, zeroes them and moves the schedule on; returns their norm over all ranks,
        before it was clipped."""

    @abstractmethod
    def writer(self, step: int) -> Write:
        """Writes all that a resumed run needs, `step` included, as it is when it is called."""

    def copied_writer(self, step: int) -> Write:
        """Writes a copy of it, taken now, from another thread."""
        raise NotImplementedError(f"{type(self).__name__} writes its checkpoints itself")

    @abstractmethod
    def load(self, folder: Path) -> int:
        """Goes on from what a writer wrote; returns its step."""

    def close(self) -> None:  # noqa: B027 - torch's engines hold on to nothing
        """Lets go of the process groups; the engine is of no use afterwards."""


class TorchEngine(Engine):
    """Torch's engines, whose gradients and optimizers the loop's steps drive directly."""

    def __init__(self, config: TrainConfig, environment: Environment, model: LlamaForCausalLM) -> None:
        self.accumulation_steps = config.accumulation_steps
        self.clip_norm = config.clip_norm
        self.no_gradient_sync: Context = nullcontext
        self.expected_state_bytes = expected_state_bytes(config, model, environment.world_size)
        if config.engine == "fsdp2":
            self._shard(config, environment, model)
        else:
            self.precision = lambda: torch.autocast(
                environment.device.type, torch.bfloat16, enabled=config.dtype == "bf16"
            )
            self.model = model
            if config.engine == "ddp":
                on_cuda = environment.device.type == "cuda"
                self.model = ddp = DistributedDataParallel(model, device_ids=[environment.device] if on_cuda else None)
                self.no_gradient_sync = ddp.no_sync
        self.optimizers = build_optimizers(config, self.model)
        self.last_pass: Context = nullcontext
        if config.during_backward:
            (optimizer,) = self.optimizers
            assert isinstance(optimizer, DistMuon)
            self.last_pass = optimizer.during_backward
        self.schedulers = [warmup_cosine(optimizer, config.warmup_steps, config.steps) for optimizer in self.optimizers]

    def _shard(self, config: TrainConfig, environment: Environment, model: LlamaForCausalLM) -> None:
        policy = MixedPrecisionPolicy()
        if config.dtype == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = data_parallel_mesh(environment.device.type, config.replicas)
        sharded = shard_transformer(model, transformer_blocks(model), mesh, policy)
        self.model = model
        self.no_gradient_sync = lambda: no_gradient_sync(sharded)

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        with self.last_pass() if is_last else self.no_gradient_sync():
            yield

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation_steps).backward()

    def step(self) -> Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if math.isfinite(self.clip_norm):
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip_norm, norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in self.schedulers:
            scheduler.step()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def writer(self, step: int) -> Write:
        state = TrainingState(self.model, self.optimizers, self.schedulers, step)
        return lambda folder, group: _save(state, folder, group)

    def copied_writer(self, step: int) -> Write:
        copy = on_host(TrainingState(self.model, self.optimizers, self.schedulers, step).state_dict())
        return lambda folder, group: _save(copy, folder, group)

    def load(self, folder: Path) -> int:
        state = TrainingState(self.model, self.optimizers, self.schedulers)
        dcp.load({"training": state}, checkpoint_id=folder)
        return state.step


class TrainingState(Stateful):
    """All that a resumed run needs. The data's order is a function of seed and step, so the step stands for it."""

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], schedulers: Sequence[LRScheduler], step: int = 0
    ) -> None:
        self.model = model
        self.optimizers = optimizers
        self.schedulers = schedulers
        self.step = step

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizers)
        schedulers = [scheduler.state_dict() for scheduler in self.schedulers]
        return {"model": model, "optimizer": optimizer, "schedulers": schedulers, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizers,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )
        for scheduler, state in zip(self.schedulers, state_dict["schedulers"], strict=True):
            scheduler.load_state_dict(state)
        self.step = state_dict["step"]


def _save(state: TrainingState | dict[str, Any], folder: Path, group: dist.ProcessGroup | None) -> None:
    dcp.save({"training": state}, checkpoint_id=folder, process_group=group)
