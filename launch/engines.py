"""The three ways a model lies on the ranks, behind the one face the training loop sees."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from muon_dist.integrations.fsdp import data_parallel_mesh, no_gradient_sync, shard_transformer
from muon_dist.launch.config import TrainConfig
from muon_dist.launch.environment import Environment
from muon_dist.launch.models import transformer_blocks

Context = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Engine:
    model: nn.Module
    precision: Context  # around every forward pass
    no_gradient_sync: Context  # around the micro-batches whose gradients only add up


def build_engine(config: TrainConfig, environment: Environment, model: LlamaForCausalLM) -> Engine:
    device = environment.device

    def autocast() -> AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bf16")

    if config.engine == "single":
        return Engine(model, precision=autocast, no_gradient_sync=nullcontext)
    if config.engine == "ddp":
        ddp = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
        return Engine(ddp, precision=autocast, no_gradient_sync=ddp.no_sync)
    policy = MixedPrecisionPolicy()
    if config.dtype == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded = shard_transformer(
        model, transformer_blocks(model), data_parallel_mesh(device.type, config.replicas), policy
    )
    return Engine(model, precision=nullcontext, no_gradient_sync=lambda: no_gradient_sync(sharded))
