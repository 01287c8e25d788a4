"""DistMuon in torchtitan: its models with our optimizer, under the names llama3_dist_muon and qwen3_dist_muon.

On GPUs, torchtitan's own trainer takes this module by name. From this folder, with a config file of torchtitan's:

    torchrun --nproc-per-node 8 -m torchtitan.train --job.config_file llama3_8b.toml \
        --experimental.custom_import dist_muon --model.name llama3_dist_muon --optimizer.lr 2e-2

`--optimizer.lr` and `--optimizer.weight_decay` are those of the hidden matrices; betas and eps are AdamW's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import Optimizer as OptimizerConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec, register_train_spec

from muon_dist import DistMuon

ADAMW_LR = 3e-4  # of embeddings, heads and norms; torchtitan has one learning rate only


class DistMuonContainer(OptimizersContainer[DistMuon]):
    """torchtitan's container, which it builds without the parameters' names."""

    def __init__(self, model_parts: list[nn.Module], options: dict[str, Any]) -> None:
        self.model_parts = model_parts
        self.optimizers = [DistMuon(part.named_parameters(), **options) for part in model_parts]
        Optimizer.__init__(self, [p for part in model_parts for p in part.parameters()], options)  # for its hooks


def build_optimizers(
    model_parts: list[nn.Module], config: OptimizerConfig, parallel_dims: ParallelDims, ft_manager: Any = None
) -> DistMuonContainer:
    """As torchtitan's function of this name."""
    options = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "adamw_lr": ADAMW_LR,
        "adamw_betas": (config.beta1, config.beta2),
        "adamw_eps": config.eps,
    }
    return DistMuonContainer(model_parts, options)


for name in ("llama3", "qwen3"):
    spec = dataclasses.replace(get_train_spec(name), build_optimizers_fn=build_optimizers)
    register_train_spec(f"{name}_dist_muon", spec)
