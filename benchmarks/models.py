"""Llama shapes by name: their parameters, as random shards or as modules; mixtures of experts for the cost model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from muon_dist.layout import chunk_range

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class Model:
    """A decoder with SwiGLU and grouped-query attention; with experts, each of three matrices of its own."""

    vocabulary: int
    hidden: int
    intermediate: int  # of the feed-forward part, or of one expert
    layers: int
    heads: int
    key_value_heads: int
    tied: bool = False  # embedding and head are one
    experts: int = 0
    recomputes: bool = False  # activations, in the backward pass

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter, by its name in transformers."""
        key_value = self.hidden // self.heads * self.key_value_heads
        attention = {"q": self.hidden, "k": key_value, "v": key_value}
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for i in range(self.layers):
            at = f"model.layers.{i}"
            found |= {f"{at}.self_attn.{k}_proj.weight": (rows, self.hidden) for k, rows in attention.items()}
            found[f"{at}.self_attn.o_proj.weight"] = (self.hidden, self.hidden)
            for mlp in [f"{at}.mlp.experts.{e}" for e in range(self.experts)] or [f"{at}.mlp"]:
                found[f"{mlp}.gate_proj.weight"] = (self.intermediate, self.hidden)
                found[f"{mlp}.up_proj.weight"] = (self.intermediate, self.hidden)
                found[f"{mlp}.down_proj.weight"] = (self.hidden, self.intermediate)
            found |= {f"{at}.{norm}_layernorm.weight": (self.hidden,) for norm in ("input", "post_attention")}
        found["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            found["lm_head.weight"] = (self.vocabulary, self.hidden)
        return found


MODELS = {
    "nano": Model(256, 256, 688, layers=4, heads=4, key_value_heads=4),
    "135m": Model(32000, 768, 2048, layers=12, heads=12, key_value_heads=12),
    "llama-1b": Model(128256, 2048, 8192, layers=16, heads=32, key_value_heads=8, tied=True),  # Llama 3.2
    "llama-8b": Model(128256, 4096, 14336, layers=32, heads=32, key_value_heads=8, recomputes=True),  # Llama 3.1
    "llama-70b": Model(128256, 8192, 28672, layers=80, heads=64, key_value_heads=8, recomputes=True),
    "moe-1t": Model(163840, 7168, 2048, layers=60, heads=64, key_value_heads=64, experts=384),  # as large as Kimi K2
}


def random_shards(model: Model, mesh: DeviceMesh, device: torch.device) -> list[tuple[str, nn.Parameter]]:
    """The model's parameters with gradients, bf16, cut by rows over a 1-D mesh as FSDP2 cuts them."""
    return [(name, _random_shard(shape, mesh, device)) for name, shape in model.parameters().items()]


def _random_shard(shape: tuple[int, ...], mesh: DeviceMesh, device: torch.device) -> nn.Parameter:
    _, rows = chunk_range(shape[0], mesh.size(), mesh.get_local_rank())
    stride = (shape[1], 1) if len(shape) == 2 else (1,)

    def shard(scale: float) -> DTensor:
        part = torch.randn(rows, *shape[1:], device=device, dtype=torch.bfloat16) * scale
        return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)

    parameter = nn.Parameter(shard(0.02))
    parameter.grad = shard(1e-3)
    return parameter


def build(model: Model, length: int, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """The module of a model without experts, the same random weights on every rank."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.key_value_heads,
        tie_word_embeddings=model.tied,
        max_position_embeddings=length,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with device:
        built = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    if model.recomputes:
        built.gradient_checkpointing_enable({"use_reentrant": False})
    return built


def tokens(model: Model, sequences: int, length: int, device: torch.device) -> Tensor:
    """Random ones, [sequences, length]."""
    return torch.randint(model.vocabulary, (sequences, length), device=device)
