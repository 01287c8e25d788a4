"""A small Llama on the Hugging Face Trainer with FSDP2, trained with DistMuon.

    torchrun --nproc-per-node 2 examples/huggingface_fsdp2/train.py

Takes the options of TrainingArguments, for instance --max_steps 200. On ranks without a GPU the Trainer has no FSDP:
the model is replicated there (DDP), and DistMuon reads that.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaConfig, Trainer, TrainingArguments, set_seed

from muon_dist import DistMuon

SEQUENCE_LENGTH = 64


def main() -> tuple[DistMuon, list[float]]:
    """Trains; returns the optimizer and the losses that were logged."""
    parser = HfArgumentParser(TrainingArguments)
    parser.set_defaults(
        fsdp=True,
        fsdp_config={"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        output_dir="runs/huggingface_fsdp2",
        use_cpu=not torch.cuda.is_available(),
        max_steps=60,
        warmup_steps=5,
        per_device_train_batch_size=8,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    (arguments,) = parser.parse_args_into_dataclasses()
    set_seed(arguments.seed)
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
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=windows(),
        # The names tell embeddings and heads from hidden matrices. The Trainer's schedule scales both learning rates.
        optimizer_cls_and_kwargs=(
            DistMuon,
            {"params": list(model.named_parameters()), "lr": 2e-2, "adamw_lr": 1e-3, "weight_decay": 0.1},
        ),
    )
    trainer.train()
    optimizer = trainer.optimizer.optimizer  # of Accelerate's wrapper
    text = optimizer.describe()
    if trainer.is_world_process_zero():
        print(text)
    return optimizer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def windows() -> list[dict[str, torch.Tensor]]:
    """The bytes of a text, cut up; here of a module of the standard library."""
    tokens = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    return [{"input_ids": part, "labels": part} for part in tokens.split(SEQUENCE_LENGTH)[:-1]]


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
