"""A small Llama on the Hugging Face Trainer with DeepSpeed, whose ds_config.json names DistMuon as the optimizer.

    torchrun --nproc-per-node 2 examples/huggingface_deepspeed/train.py
    deepspeed --num_gpus 2 examples/huggingface_deepspeed/train.py

Takes the options of TrainingArguments, for instance --max_steps 200 --deepspeed my_config.json. It runs without a GPU
too, but there transformers takes every process for the only one and does not divide the batches among them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaConfig, Trainer, TrainingArguments, set_seed

import muon_dist.integrations.deepspeed  # noqa: F401 - makes "type": "DistMuon" known to DeepSpeed

SEQUENCE_LENGTH = 64


def main() -> tuple[DeepSpeedEngine, list[float]]:
    """Trains; returns DeepSpeed's engine and the losses that were logged."""
    parser = HfArgumentParser(TrainingArguments)
    parser.set_defaults(
        deepspeed=str(Path(__file__).with_name("ds_config.json")),
        output_dir="runs/huggingface_deepspeed",
        learning_rate=2e-2,  # of the hidden matrices; "adamw_lr" in ds_config.json is that of the rest
        weight_decay=0.1,
        adam_beta2=0.95,
        max_steps=60,
        warmup_steps=5,
        per_device_train_batch_size=8,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    (arguments,) = parser.parse_args_into_dataclasses()
    set_seed(arguments.seed)
    # After TrainingArguments, so that ZeRO-3 partitions the model while it is being made.
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
    trainer = Trainer(model=model, args=arguments, train_dataset=windows())
    trainer.train()
    engine = trainer.model_wrapped
    if torch.distributed.get_rank() == 0:
        print(engine.basic_optimizer.grouping())
    return engine, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def windows() -> list[dict[str, torch.Tensor]]:
    """The bytes of a text, cut up; here of a module of the standard library."""
    tokens = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    return [{"input_ids": part, "labels": part} for part in tokens.split(SEQUENCE_LENGTH)[:-1]]


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
