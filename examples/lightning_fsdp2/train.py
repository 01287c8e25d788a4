"""A small Llama on Lightning's ModelParallelStrategy, which is its FSDP2, trained with DistMuon.

    torchrun --nproc-per-node 2 examples/lightning_fsdp2/train.py

The model is sharded in `configure_model`, and the optimizer made after it. Runs on GPUs, and without any on CPU ranks.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from muon_dist import DistMuon

SEQUENCE_LENGTH = 64


class Llama(LightningModule):
    """The language model, and what Lightning asks of it."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.model = AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=256,
                hidden_size=64,
                intermediate_size=176,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=False,
            )
        )

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = DistMuon(self.named_parameters(), lr=2e-2, adamw_lr=1e-3)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.2, total_iters=5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}

    def training_step(self, tokens: torch.Tensor, index: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=tokens, labels=tokens).loss
        self.losses.append(loss.item())
        return loss


def main() -> tuple[DistMuon, list[float]]:
    """Trains; returns the optimizer and this rank's loss in each step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    seed_everything(0)
    ranks = int(os.environ["WORLD_SIZE"])
    trainer = Trainer(
        strategy=ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1),
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=ranks,  # of this node
        max_steps=arguments.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    module = Llama()
    trainer.fit(module, DataLoader(windows(), batch_size=8, shuffle=True))
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, DistMuon)
    text = optimizer.describe()
    if trainer.is_global_zero:
        print(text)
    return optimizer, module.losses


def windows() -> list[torch.Tensor]:
    """The bytes of a text, cut up; here of a module of the standard library."""
    tokens = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    return list(tokens.split(SEQUENCE_LENGTH)[:-1])


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
