"""`muon-dist estimate`: from a preset, a config or shapes to figures, a table and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, T5Config, ViTConfig

from muon_dist.grouping import assign
from muon_dist.launch.cli import main
from muon_dist.launch.config import EstimateConfig
from muon_dist.launch.estimate import estimate
from muon_dist.launch.shapes import read_shapes
from muon_dist.memory import measured_state_bytes

CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def test_a_config_a_folder_and_a_file_of_shapes_are_the_same_model(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(CONFIG)
    CONFIG.save_pretrained(tmp_path)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    (tmp_path / "shapes.json").write_text(json.dumps(shapes))
    for source in (tmp_path, tmp_path / "config.json", tmp_path / "shapes.json"):
        found = read_shapes(str(source))
        assert {name: list(p.shape) for name, p in found.items()} == shapes
        assert all(p.is_meta for p in found.values())


@pytest.mark.parametrize("config", [GPT2Config(), ViTConfig(), T5Config()], ids=lambda c: c.model_type)
def test_models_are_those_that_configs_were_written_for(config: Any, tmp_path: Path) -> None:
    """The class that ``architectures`` names: not every model is a language model."""
    name = {"gpt2": "GPT2LMHeadModel", "vit": "ViTForImageClassification", "t5": "T5ForConditionalGeneration"}
    config.architectures = [name[config.model_type]]
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    assert {name: p.shape for name, p in read_shapes(str(tmp_path)).items()} == {
        name: p.shape for name, p in model.named_parameters()
    }


def test_it_prints_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "estimate.json", tmp_path / "estimate.png"
    main(["estimate", "nano", "--world-size", "2", "--out", str(out), "--plot", str(plot)])
    figures = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert [row["name"] for row in figures["rows"]] == [
        "AdamW",
        "AdamW, 8-bit (bitsandbytes)",
        "Muon, fp32 momentum",
        "DeepSpeed's Muon, ZeRO-3",
        "DistMuon, linear8",
    ]
    assert all(row["name"] in printed for row in figures["rows"])
    assert figures["sent"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_peers_of_torch_keep_is_what_they_say() -> None:
    model = AutoModelForCausalLM.from_config(CONFIG)
    grouping = assign(model.named_parameters())
    parts = ([a.parameter for a in grouping if a.algorithm == algorithm] for algorithm in ("muon", "adamw"))
    matrices, others = parts
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    adamw = [torch.optim.AdamW(model.parameters())]
    muon = [torch.optim.Muon(matrices), torch.optim.AdamW(others)]
    for optimizer in (*adamw, *muon):
        optimizer.step()
    rows, _ = estimate(grouping, EstimateConfig(world_size=1, engine="single", dtype="fp32"))
    by_name = {row.name: row for row in rows}
    assert by_name["AdamW"].state == sum(map(measured_state_bytes, adamw))
    assert by_name["Muon, fp32 momentum"].state == sum(map(measured_state_bytes, muon))
    assert by_name["AdamW"].parameters == sum(p.nbytes for p in model.parameters())


def test_offloaded_momentum_lies_on_the_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = []
    for offload in ([], ["--offload-momentum"]):
        main(["estimate", "nano", *offload, "--out", str(tmp_path / "estimate.json")])
        figures = json.loads((tmp_path / "estimate.json").read_text())
        states.append(figures["rows"][-1]["state"] + figures["offloaded"])
    assert states[0] == states[1]
    assert 0 < figures["offloaded"] < states[1]
    assert capsys.readouterr().out.count("of momentum in memory of the host") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("nano --engine deepspeed --stage 4", "--stage is 4"),
        ("nano --stage 2", "--stage is for --engine deepspeed"),
        ("nano --engine single", "add --world-size 1"),
        ("nano --world-size 6 --replicas 4", "does not divide"),
        ("/nowhere/config.json", "is no preset"),
    ],
)
def test_wrong_options(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["estimate", *options.split()])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_of_shapes_that_holds_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shapes.json").write_text('{"a.weight": "64x64"}')
    with pytest.raises(SystemExit):
        main(["estimate", str(tmp_path / "shapes.json")])
    assert "a.weight: '64x64' is no shape" in capsys.readouterr().err
