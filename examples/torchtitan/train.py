"""torchtitan's small Llama with its parallel plan, schedule and state dictionaries, trained with DistMuon.

    torchrun --nproc-per-node 2 examples/torchtitan/train.py

torchtitan's own trainer needs GPUs; its parts, used here in the same order, run on CPU ranks too. dist_muon.py says
how to start the trainer.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims, parallel_dims
from torchtitan.protocols.train_spec import get_train_spec

sys.path.insert(0, str(Path(__file__).parent))
import dist_muon  # noqa: F401 - makes llama3_dist_muon known

from muon_dist import DistMuon

SEQUENCE_LENGTH = 64


def main() -> tuple[DistMuon, list[float]]:
    """Trains; returns the optimizer and this rank's loss in each step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    config = JobConfig()
    config.training.seq_len = SEQUENCE_LENGTH
    config.training.mixed_precision_param = "bfloat16" if torch.cuda.is_available() else "float32"
    config.optimizer.lr = 2e-2
    config.lr_scheduler.warmup_steps = 5
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    parallel_dims.device_type = device.type  # torchtitan counts on a GPU
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ranks = dist.get_world_size()
    parallel = ParallelDims(dp_replicate=1, dp_shard=-1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=ranks)
    parallel.build_mesh()

    spec = get_train_spec("llama3_dist_muon")
    model_config = spec.model_args["debugmodel"]
    model_config.dim, model_config.n_layers, model_config.n_heads, model_config.vocab_size = 64, 2, 4, 256
    with torch.device("meta"):
        model = spec.model_cls(model_config)
    model = spec.parallelize_fn(model, parallel, config)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # torchtitan sums gradients; gloo needs to be told so
    model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
    optimizers = spec.build_optimizers_fn([model], config.optimizer, parallel)
    schedulers = spec.build_lr_schedulers_fn(optimizers, config.lr_scheduler, 10_000)

    losses = []
    for step in range(arguments.steps):
        if step == arguments.steps // 2:  # as if resumed from a checkpoint
            optimizers.load_state_dict(optimizers.state_dict())
        tokens = batch(step, dist.get_rank()).to(device)
        logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        (loss / ranks).backward()
        optimizers.step()
        schedulers.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    (optimizer,) = optimizers
    text = optimizer.describe()
    if dist.get_rank() == 0:
        print(text)
    return optimizer, losses


def batch(step: int, rank: int) -> torch.Tensor:
    """Some of the bytes of a text, here of a module of the standard library: [8, SEQUENCE_LENGTH + 1]."""
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    generator = torch.Generator().manual_seed(1000 * step + rank)
    starts = torch.randint(len(text) - SEQUENCE_LENGTH - 1, (8, 1), generator=generator)
    return text[starts + torch.arange(SEQUENCE_LENGTH + 1)]


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
