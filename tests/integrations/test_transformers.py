"""Models of transformers: each parameter goes where it belongs, and trains on two ranks as in one process."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from muon_dist import DistMuon
from muon_dist.integrations.fused import matrix_options
from tests.ranks import run_ranks

STEPS = 20
# Every rank's part of every vector is whole vector registers: torch's fused AdamW on CPU rounds what is left over
# otherwise, and where a gradient is zero but for rounding (the biases of keys), AdamW makes much of it.
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {"image_size": 8, "num_labels": 32, "hidden_dropout_prob": 0.0}

ATTENTION = {
    "self_attn.q_proj.weight": "muon 64x64",
    "self_attn.k_proj.weight": "muon 32x64",
    "self_attn.v_proj.weight": "muon 32x64",
    "self_attn.o_proj.weight": "muon 64x64",
}
MLP = {"mlp.gate_proj.weight": "muon 96x64", "mlp.up_proj.weight": "muon 96x64", "mlp.down_proj.weight": "muon 64x96"}
ENDS = {"embed_tokens.weight": "adamw -", "lm_head.weight": "adamw -"}

# A config, and where its parameters go: "algorithm, matrices" by the end of the name; vectors all go to AdamW.
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, str]]] = {
    "llama": (lambda: transformers.LlamaConfig(**TEXT), {**ENDS, **ATTENTION, **MLP}),
    "qwen2": (lambda: transformers.Qwen2Config(**TEXT), {**ENDS, **ATTENTION, **MLP}),
    "gemma2": (
        lambda: transformers.Gemma2Config(**TEXT, head_dim=32),
        {"embed_tokens.weight": "adamw -", **ATTENTION, **MLP},  # its head is the embedding
    ),
    "phi3": (
        lambda: transformers.Phi3Config(**TEXT, eos_token_id=2),
        {
            **ENDS,
            "self_attn.qkv_proj.weight": "muon 64x64, 2 of 32x64",
            "self_attn.o_proj.weight": "muon 64x64",
            "mlp.gate_up_proj.weight": "muon 2 of 96x64",
            "mlp.down_proj.weight": "muon 64x96",
        },
    ),
    "mixtral": (
        lambda: transformers.MixtralConfig(**TEXT, num_local_experts=3, num_experts_per_tok=2),
        {
            **ENDS,
            **ATTENTION,
            "mlp.gate.weight": "muon 3x64",
            "experts.gate_up_proj": "muon 3 of (2 of 96x64)",
            "experts.down_proj": "muon 3 of 64x96",
        },
    ),
    "qwen3_moe": (
        lambda: transformers.Qwen3MoeConfig(
            **{**TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32}
        ),
        {
            **ENDS,
            **ATTENTION,
            "mlp.gate.weight": "muon 4x64",
            "experts.gate_up_proj": "muon 4 of (2 of 32x64)",
            "experts.down_proj": "muon 4 of 64x32",
        },
    ),
    "gpt2": (
        lambda: transformers.GPT2Config(
            vocab_size=64, n_embd=64, n_layer=1, n_head=4, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        ),
        {
            "wte.weight": "adamw -",
            "wpe.weight": "adamw -",
            "attn.c_attn.weight": "muon 64x192, transposed",
            "attn.c_proj.weight": "muon 64x64, transposed",
            "mlp.c_fc.weight": "muon 64x256, transposed",
            "mlp.c_proj.weight": "muon 256x64, transposed",
        },
    ),
    "vit": (
        lambda: transformers.ViTConfig(
            **VISION,
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=96,
            patch_size=4,
            attention_probs_dropout_prob=0.0,
        ),
        {
            "cls_token": "adamw -",
            "position_embeddings": "adamw -",
            "patch_embeddings.projection.weight": "adamw -",
            **{f"attention.{part}_proj.weight": "muon 64x64" for part in "qkvo"},
            "mlp.fc1.weight": "muon 96x64",
            "mlp.fc2.weight": "muon 64x96",
            "classifier.weight": "adamw -",
        },
    ),
    "convnext": (
        lambda: transformers.ConvNextConfig(
            **VISION, num_stages=2, hidden_sizes=[32, 64], depths=[1, 1], patch_size=2, drop_path_rate=0.0
        ),
        {
            "patch_embeddings.weight": "adamw -",
            "dwconv.weight": "adamw -",
            "stages.1.downsampling_layer.1.weight": "muon 64x128",
            "stages.0.layers.0.pwconv1.weight": "muon 128x32",
            "stages.0.layers.0.pwconv2.weight": "muon 32x128",
            "stages.1.layers.0.pwconv1.weight": "muon 256x64",
            "stages.1.layers.0.pwconv2.weight": "muon 64x256",
            "classifier.weight": "adamw -",
        },
    ),
}


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    config = FAMILIES[family][0]()
    kind = "ImageClassification" if family in ("vit", "convnext") else "CausalLM"
    return getattr(transformers, f"AutoModelFor{kind}").from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_goes_where_it_belongs(family: str) -> None:
    model = model_of(family)
    expected = FAMILIES[family][1]
    seen = set()
    for a in DistMuon(model.named_parameters(), **matrix_options(model.config)).grouping():
        if len(a.shape) < 2:
            assert (a.algorithm, a.reason) == ("adamw", "a vector"), a.name
            continue
        (end,) = [end for end in expected if f".{a.name}".endswith(f".{end}")]
        assert f"{a.algorithm} {a.form or '-'}" == expected[end], a.name
        seen.add(end)
    assert seen == set(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_sharded_steps_equal_a_single_process(family: str) -> None:
    """Bit for bit: both ranks have the same batches, so that their mean gradient is that of the single process."""

    def train(model: nn.Module) -> dict[str, Tensor]:
        named = list(model.named_parameters())
        optimizer = DistMuon(named, momentum_state="linear8", wire="fp32", **matrix_options(model.config))
        for step in range(STEPS):
            model(**batch_of(family, step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in named}

    expected = train(model_of(family))

    def check(rank: int) -> None:
        model = model_of(family)
        fully_shard(model)
        for name, found in train(model).items():
            assert torch.equal(found, expected[name]), name

    run_ranks(2, check)


def batch_of(family: str, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    if family in ("vit", "convnext"):
        images = torch.randn(6, 3, 8, 8, generator=generator)
        return {"pixel_values": images, "labels": images[:, 0, 0, 0].gt(0).long()}
    tokens = torch.randint(1, 64, (4, 12), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


MOE: dict[str, Any] = {**TEXT, "num_experts_per_tok": 2, "num_hidden_layers": 2}
NARROW: dict[str, Any] = {**MOE, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_routed_experts": 4}
OTHERS: dict[str, dict[str, Any]] = {
    "Glm": TEXT,
    "Glm4": TEXT,
    "Phimoe": MOE,
    "Olmoe": {**MOE, "num_experts": 4},
    "GraniteMoe": MOE,
    "Qwen2Moe": {**MOE, "num_experts": 4, "moe_intermediate_size": 32},
    "Glm4Moe": NARROW,
    "DeepseekV3": {**NARROW, "n_group": 1, "topk_group": 1},
    "ModernBert": {**TEXT, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "GptOss": {**MOE, "num_local_experts": 4},
    "Llama4Text": {**MOE, "num_local_experts": 4, "intermediate_size_mlp": 96},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_table_fits_the_models(kind: str) -> None:
    """Every pattern names something, splits add up, and nothing that is named like a fused weight is left out."""
    config = getattr(transformers, f"{kind}Config")(**OTHERS[kind])
    auto = transformers.AutoModelForMaskedLM if kind == "ModernBert" else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    options = matrix_options(config)
    names = [name for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith("bias")]
    for pattern in (*options["splits"], *options["transposed"]):
        assert any(fnmatchcase(name, pattern) for name in names), pattern
    for a in DistMuon(model.named_parameters(), **options).grouping():
        if any(part in a.name for part in ("gate_up_proj", "qkv", "Wi")) and len(a.shape) > 1 and "bias" not in a.name:
            assert a.form is not None
            assert a.form.transposed or len(a.form.splits) > 1, a.name


def test_a_model_type_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"models of type 'mpt' fuse is not known.*qwen3_moe.*splits"):
        matrix_options(transformers.MptConfig())
