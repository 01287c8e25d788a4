"""Whole training steps of a Llama under FSDP2 and under DeepSpeed's ZeRO, for benchmarks that time what is inside."""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from models import Model, build
from muon_dist import DistMuon
from muon_dist.integrations.fsdp import shard_transformer
from optimizers import Make

# DeepSpeed's optimizers, by the names that the tables give them.
_OPTIONS = {"lr": 5e-3, "weight_decay": 0.0, "adamw_lr": 3e-4}
DEEPSPEED_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "DistMuon, linear8, bf16 wire": {"type": "DistMuon", "params": _OPTIONS},
    "DistMuon, linear8, int8 wire": {"type": "DistMuon", "params": {**_OPTIONS, "wire": "int8"}},
    "DeepSpeed's Muon": {"type": "Muon", "params": {"muon_lr": 5e-3, "adam_lr": 3e-4, "torch_adam": True}},
    "AdamW": {"type": "AdamW", "params": {"lr": 3e-4, "torch_adam": True}},
}


class Trainer(Protocol):
    """A model on its ranks; one micro-batch a step."""

    def backward(self, tokens: Tensor) -> Tensor:
        """Forward and backward pass; returns the loss."""

    def step(self) -> None:
        """Updates the parameters and drops their gradients."""

    def close(self) -> None:
        """Lets go of all memory."""


class Fsdp2:
    """Parameters in ``dtype``, computed with in bf16 on GPUs, gradients reduced in fp32."""

    def __init__(
        self, model: Model, length: int, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype, make: Make
    ) -> None:
        self.model = build(model, length, device, dtype)
        on_cuda = device.type == "cuda"
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if on_cuda else MixedPrecisionPolicy()
        shard_transformer(self.model, list(self.model.model.layers), mesh, policy)
        self.optimizers = make(list(self.model.named_parameters()))

    def backward(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def close(self) -> None:
        self.optimizers.clear()
        del self.model


class EarlyFsdp2(Fsdp2):
    """The optimizer's step begins during the backward pass."""

    def backward(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        (optimizer,) = self.optimizers
        assert isinstance(optimizer, DistMuon)
        with optimizer.during_backward():
            loss.backward()
        return loss.detach()


class Zero:
    """bf16 with fp32 master weights, on all ranks of the job."""

    def __init__(
        self, model: Model, length: int, sequences: int, device: torch.device, optimizer: dict[str, Any], stage: int
    ) -> None:
        deepspeed = import_deepspeed()
        built = build(model, length, device, torch.float32)
        zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
        if stage == 3 and optimizer["type"] == "Muon":
            zero["reduce_scatter"] = False  # it refuses anything else
        config = {
            "train_micro_batch_size_per_gpu": sequences,
            "zero_optimization": zero,
            "optimizer": optimizer,
            "gradient_clipping": 0.0,  # DeepSpeed's Muon would clip the orthogonal update
            "bf16": {"enabled": True},
        }
        self.engine: Any
        self.engine, *_ = deepspeed.initialize(model=built, model_parameters=built.parameters(), config=config)

    def backward(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.engine(input_ids=tokens, labels=tokens).loss
        self.engine.backward(loss)
        return loss.detach()

    def step(self) -> None:
        self.engine.step()

    def close(self) -> None:
        self.engine.destroy()


def import_deepspeed() -> Any:
    """DeepSpeed with DistMuon known to it. Call it after :class:`traffic.Traffic` was made."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    if not torch.cuda.is_available():
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # DeepSpeed's Muon compiles itself, for minutes on CPU
    from muon_dist.launch.deepspeed_engine import import_deepspeed

    return import_deepspeed()
