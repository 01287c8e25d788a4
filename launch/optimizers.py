"""The optimizers a run can choose from; all three tell matrices from the rest by `muon_dist.grouping`."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from muon_dist import DistMuon
from muon_dist.grouping import assign
from muon_dist.launch.config import TrainConfig
from muon_dist.memory import estimated_state_bytes
from muon_dist.options import Options

ADAMW_BETAS = (0.9, 0.95)
FINAL_LR = 0.1  # of the peak


def build_optimizers(config: TrainConfig, model: nn.Module) -> list[Optimizer]:
    """One optimizer, or two: torch's Muon takes nothing but matrices."""
    if config.optimizer == "dist_muon":
        return [
            DistMuon(
                model.named_parameters(),
                lr=config.lr,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                momentum_state=config.momentum_state,
                block_size=config.block_size,
                polar=config.polar,
                wire=config.wire,
                offload_momentum=config.offload_momentum,
                adamw_lr=config.adamw_lr,
                adamw_betas=ADAMW_BETAS,
            )
        ]
    assignments = assign(model.named_parameters())
    matrices = [assignment.parameter for assignment in assignments if assignment.algorithm == "muon"]
    others = [assignment.parameter for assignment in assignments if assignment.algorithm == "adamw"]
    if config.optimizer == "torch_muon":
        return [
            Muon(matrices, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay),
            AdamW(others, lr=config.adamw_lr, betas=ADAMW_BETAS, weight_decay=0.0),
        ]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [AdamW(groups, lr=config.adamw_lr, betas=ADAMW_BETAS)]


def expected_state_bytes(config: TrainConfig, model: nn.Module, world_size: int) -> int:
    """What `build_optimizers` will keep on the fullest rank, from shapes alone."""
    shards = world_size // config.replicas if config.engine == "fsdp2" else 1
    assignments = assign(model.named_parameters())
    if config.optimizer == "dist_muon":
        options = Options(momentum_state=config.momentum_state, block_size=config.block_size)
        return estimated_state_bytes(assignments, shards=shards, replicas=world_size // shards, options=options)
    # Torch's optimizers keep fp32 and repeat it on every replica.
    options = Options(momentum_state="fp32")
    if config.optimizer == "torch_muon":
        return estimated_state_bytes(assignments, shards=shards, options=options)
    return estimated_state_bytes([a.with_adamw() for a in assignments], shards=shards, options=options)


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, steps: int) -> LambdaLR:
    """Linear warm-up from the first step on, then a cosine down to 10% of each group's own peak."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
        return FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
