"""A small Llama on Hugging Face Accelerate with DeepSpeed, whose ds_config.json names DistMuon as the optimizer.

    torchrun --nproc-per-node 2 examples/accelerate_deepspeed/train.py
    deepspeed --num_gpus 2 examples/accelerate_deepspeed/train.py

It runs without a GPU too, but there Accelerate takes every process for the only one and does not divide the batches
among them.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler, set_seed
from deepspeed import DeepSpeedEngine
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, get_linear_schedule_with_warmup

import muon_dist.integrations.deepspeed  # noqa: F401 - makes "type": "DistMuon" known to DeepSpeed

SEQUENCE_LENGTH = 64


def main() -> tuple[DeepSpeedEngine, list[float]]:
    """Trains; returns DeepSpeed's engine and the loss of each step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--deepspeed", default=str(Path(__file__).with_name("ds_config.json")))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--local_rank", help="given by the deepspeed launcher; not used")
    arguments = parser.parse_args()

    set_seed(0)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=arguments.deepspeed))
    # After Accelerator, so that ZeRO-3 partitions the model while it is being made.
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
    # The optimizer is in the JSON file; this one stands in for it, with the values of what is "auto" there.
    optimizer = DummyOptim(model.parameters(), lr=2e-2, weight_decay=0.1)
    schedule = partial(get_linear_schedule_with_warmup, num_warmup_steps=5, num_training_steps=arguments.steps)
    scheduler = DummyScheduler(optimizer, lr_scheduler_callable=schedule)
    loader = DataLoader(windows(), batch_size=8, shuffle=True)
    engine, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

    losses = []
    for step, tokens in zip(range(arguments.steps), loader, strict=False):
        loss = engine(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)  # steps the optimizer and the scheduler as well
        losses.append(loss.item())
        if step % 5 == 0 and torch.distributed.get_rank() == 0:
            print(f"step {step}  loss {losses[-1]:.4f}")
    if torch.distributed.get_rank() == 0:
        print(engine.basic_optimizer.grouping())
    return engine, losses


def windows() -> list[torch.Tensor]:
    """The bytes of a text, cut up; here of a module of the standard library."""
    tokens = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    return list(tokens.split(SEQUENCE_LENGTH)[:-1])


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
