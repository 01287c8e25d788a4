"""Which matrices the models of transformers fuse: DistMuon's ``splits`` and ``transposed`` from a model's config.

    optimizer = DistMuon(model.named_parameters(), **matrix_options(model.config))

Shapes do not say where a fused weight is to be cut, so this is a table of model types, read in transformers 5.23.
What is fused along columns, or interleaved, stays one matrix: query, key and value of GPT-2's Conv1D, the gates of
GPT-OSS's and Llama 4's experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

# Patterns of names, and the rows of each matrix in what they name, from a config.
Splits: TypeAlias = Mapping[str, Callable[[Any], tuple[int, ...]]]


def _query_key_value(config: Any) -> tuple[int, ...]:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key = head * config.num_key_value_heads
    return head * config.num_attention_heads, key, key


def _gate_up(config: Any) -> tuple[int, ...]:
    return (config.intermediate_size,) * 2


def _expert_gate_up(config: Any) -> tuple[int, ...]:
    return (config.moe_intermediate_size,) * 2


_WIDE_EXPERTS: Splits = {"*.experts.gate_up_proj": _gate_up}
_NARROW_EXPERTS: Splits = {"*.experts.gate_up_proj": _expert_gate_up}
_GATED: Splits = {"*.mlp.gate_up_proj.weight": _gate_up}

_FUSED: dict[str, Splits] = {
    "phi3": {"*.self_attn.qkv_proj.weight": _query_key_value, **_GATED},
    "glm": _GATED,
    "glm4": _GATED,
    "mixtral": _WIDE_EXPERTS,
    "phimoe": _WIDE_EXPERTS,
    "olmoe": _WIDE_EXPERTS,
    "granitemoe": _WIDE_EXPERTS,
    "qwen2_moe": _NARROW_EXPERTS,
    "qwen3_moe": _NARROW_EXPERTS,
    "deepseek_v3": _NARROW_EXPERTS,
    "glm4_moe": _NARROW_EXPERTS,
    "modernbert": {"*.attn.Wqkv.weight": lambda config: (config.hidden_size,) * 3, "*.mlp.Wi.weight": _gate_up},
}
_TRANSPOSED: dict[str, tuple[str, ...]] = {
    "gpt2": ("*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight"),
    "gpt_oss": ("*.experts.gate_up_proj", "*.experts.down_proj"),
    "llama4_text": ("*.experts.gate_up_proj", "*.experts.down_proj"),
}
_PLAIN = frozenset(
    ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "bert", "vit", "convnext"]
)


def matrix_options(config: Any) -> dict[str, Any]:
    """``splits`` and ``transposed`` for :class:`muon_dist.DistMuon`, with patterns for the names of the whole model.

    Args:
        config: of a model of transformers; of one with several parts, the part's.

    Raises:
        ValueError: the model type is not in the table.
    """
    kind = config.model_type
    if kind not in (*_FUSED, *_TRANSPOSED, *_PLAIN):
        known = ", ".join(sorted({*_FUSED, *_TRANSPOSED, *_PLAIN}))
        raise ValueError(
            f"what models of type {kind!r} fuse is not known, but of {known}; say it with DistMuon's splits and "
            f"transposed, or leave these out where nothing is fused"
        )
    return {
        "splits": {pattern: sizes(config) for pattern, sizes in _FUSED.get(kind, {}).items()},
        "transposed": _TRANSPOSED.get(kind, ()),
    }
