"""Llama presets over bytes: built from their config with fresh weights, nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from muon_dist.launch.config import ModelName

BYTE_VOCABULARY = 256


@dataclass(frozen=True)
class Preset:
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int


PRESETS: dict[ModelName, Preset] = {
    "nano": Preset(hidden_size=32, intermediate_size=88, layers=2, heads=2, key_value_heads=1),  # 36 k; for tests
    "tiny": Preset(hidden_size=256, intermediate_size=688, layers=2, heads=4, key_value_heads=4),  # 1.7 M; quickstart
    "small": Preset(hidden_size=512, intermediate_size=1408, layers=6, heads=8, key_value_heads=8),  # 20 M
    "65m": Preset(hidden_size=1024, intermediate_size=2816, layers=5, heads=16, key_value_heads=16),
    "85m": Preset(hidden_size=768, intermediate_size=2048, layers=12, heads=12, key_value_heads=12),
    "300m": Preset(hidden_size=1024, intermediate_size=2816, layers=24, heads=16, key_value_heads=16),
    "1b": Preset(hidden_size=2048, intermediate_size=5632, layers=22, heads=32, key_value_heads=4),  # TinyLlama's
}


def build_model(name: ModelName, sequence_length: int, device: torch.device, seed: int) -> LlamaForCausalLM:
    """The same weights on every rank: engines shard them without a broadcast."""
    return build_llama(PRESETS[name], sequence_length, device, seed)


def build_llama(preset: Preset, sequence_length: int, device: torch.device, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=BYTE_VOCABULARY,
        hidden_size=preset.hidden_size,
        intermediate_size=preset.intermediate_size,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.key_value_heads,
        max_position_embeddings=sequence_length,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    with device:
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def transformer_blocks(model: LlamaForCausalLM) -> Sequence[nn.Module]:
    return list(model.model.layers)
