"""A small Llama on Hugging Face Accelerate with FSDP2, trained with DistMuon.

    torchrun --nproc-per-node 2 examples/accelerate_fsdp2/train.py

Accelerate shards the model in `prepare` and puts the shards into the optimizer; DistMuon reads where they lie before
its next step. On ranks without a GPU Accelerate has no FSDP: the model is replicated there (DDP), and DistMuon reads
that.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, get_linear_schedule_with_warmup

from muon_dist import DistMuon

SEQUENCE_LENGTH = 64


def main() -> tuple[DistMuon, list[float]]:
    """Trains; returns the optimizer and this rank's loss in each step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()

    set_seed(0)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
    accelerator = Accelerator(fsdp_plugin=plugin, cpu=not torch.cuda.is_available())
    model = AutoModelForCausalLM.from_config(
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
    optimizer = DistMuon(model.named_parameters(), lr=2e-2, adamw_lr=1e-3)
    scheduler = get_linear_schedule_with_warmup(optimizer, 5 * accelerator.num_processes, 10**4)
    loader = DataLoader(windows(), batch_size=8, shuffle=True)
    model, prepared, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

    losses = []
    for step, tokens in zip(range(arguments.steps), loader, strict=False):
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        prepared.step()
        scheduler.step()
        prepared.zero_grad()
        losses.append(loss.item())
        if step % 5 == 0:
            accelerator.print(f"step {step}  loss {losses[-1]:.4f}")
    text = optimizer.describe()
    accelerator.print(text)
    return optimizer, losses


def windows() -> list[torch.Tensor]:
    """The bytes of a text, cut up; here of a module of the standard library."""
    tokens = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    return list(tokens.split(SEQUENCE_LENGTH)[:-1])


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
