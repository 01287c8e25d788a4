"""One small model trained by every engine, so that tests can move its state from any to any."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")

import deepspeed  # in the parent, before ranks are forked
from deepspeed.moe.layer import MoE  # noqa: F401 - for tests, which must not import DeepSpeed before the lines above

import tests.integrations.without_kernels  # noqa: F401
from muon_dist import DistMuon, checkpoint
from muon_dist.checkpoint import LoadReport
from muon_dist.integrations import deepspeed as integration
from muon_dist.integrations.fsdp1 import FlatDistMuon
from muon_dist.names import plain_name

# Layouts by name, and their ranks.
LAYOUTS = {
    "single": 1,
    "FSDP2 x2": 2,
    "FSDP2 x3": 3,
    "HSDP 2x2": 4,
    "DDP x2": 2,
    "ZeRO-1 x2": 2,
    "ZeRO-2 x2": 2,
    "ZeRO-3 x2": 2,
}
# Those that are not moved from and to all others, which takes long.
MORE_LAYOUTS = {"FSDP1 x2": 2, "FSDP1 x3": 3}
SEQUENCES = 12  # a step, over all ranks


class Model(nn.Module):
    """Shapes of which few cuts of one layout are cuts of another, but for columns, which 4-bit codes take in pairs; the
    embedding is large enough to be quantised."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(97, 44)
        self.conv = nn.Conv1d(44, 68, 2, padding=1)
        self.down = nn.Linear(68, 44, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 20, 44) / 7)
        self.norm = nn.LayerNorm(44)
        self.lm_head = nn.Linear(44, 97, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed_tokens(tokens)
        h = h + self.down(torch.relu(self.conv(h.mT)[..., :-1].mT))
        h = h + torch.relu(h.unsqueeze(1) @ self.experts.mT).matmul(self.experts).mean(1)
        logits = self.lm_head(self.norm(h))
        return functional.cross_entropy(logits.flatten(0, 1), (tokens.flatten() + 1) % 97)


def batch(step: int) -> Tensor:
    """This rank's part of a step's sequences, which are the same in every layout."""
    whole = torch.randint(97, (SEQUENCES, 8), generator=torch.Generator().manual_seed(step))
    return whole.chunk(dist.get_world_size())[dist.get_rank()]


@dataclass
class Trainer:
    """The model in one layout, with its optimizer."""

    model: nn.Module  # with the parameters as the layout has them
    module: Any  # what is called: the model, or an engine's wrapper
    optimizer: DistMuon

    @classmethod
    def of(cls, layout: str, options: dict[str, Any], weights: dict[str, Tensor] | None = None) -> Trainer:
        torch.manual_seed(0)
        model = Model()
        if weights is not None:
            model.load_state_dict(weights)
        if layout.startswith("ZeRO"):
            engine, *_ = deepspeed.initialize(
                model=model, model_parameters=model.parameters(), config=ds_config(int(layout[5]), options)
            )
            return cls(model, engine, engine.basic_optimizer)
        if layout.startswith("FSDP1"):
            wrapped = FullyShardedDataParallel(
                model,
                auto_wrap_policy=ModuleWrapPolicy({nn.Conv1d, nn.LayerNorm}),
                use_orig_params=True,
                device_id=torch.device("cpu"),
            )
            return cls(wrapped, wrapped, FlatDistMuon(wrapped, **options))
        module: nn.Module = model
        if "SDP2" in layout:
            fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        elif layout.startswith("HSDP"):
            fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
        elif layout.startswith("DDP"):
            module = DistributedDataParallel(model)
        return cls(model, module, DistMuon(module.named_parameters(), **options))

    @staticmethod
    def initial_weights() -> dict[str, Tensor]:
        torch.manual_seed(0)
        return {name: p.detach() for name, p in Model().named_parameters()}

    def train(self, steps: range) -> None:
        for step in steps:
            loss = self.module(batch(step))
            if isinstance(self.module, deepspeed.DeepSpeedEngine):
                self.module.backward(loss)
                self.module.step()
            else:
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        if isinstance(self.model, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(self.model):
                return {plain_name(name): p.detach().clone() for name, p in self.model.named_parameters()}
        return {name: _whole(p) for name, p in self.model.named_parameters()}

    def save(self, folder: Path) -> None:
        if isinstance(self.module, deepspeed.DeepSpeedEngine):
            integration.save_state(self.module, folder)
        else:
            checkpoint.save_state(self.optimizer, folder)

    def load(self, folder: Path, **how: Any) -> LoadReport:
        if isinstance(self.module, deepspeed.DeepSpeedEngine):
            return integration.load_state(self.module, folder, **how)
        return checkpoint.load_state(self.optimizer, folder, **how)


def ds_config(stage: int, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": SEQUENCES // dist.get_world_size(),
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": "DistMuon", "params": options},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 5000},
    }


def _whole(parameter: Tensor) -> Tensor:
    if hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().float().clone()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().float().clone()
