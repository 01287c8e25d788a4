"""DistMuon under the Hugging Face Trainer and Accelerate with DeepSpeed: the examples as they are, and what the
Trainer fills in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from tests.ranks import run_ranks

pytest.importorskip("deepspeed")
pytest.importorskip("accelerate")

import tests.integrations.without_kernels  # noqa: F401
from muon_dist.integrations.deepspeed import DistOrthogonal

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_SECONDS = 60
JSON_OPTIONS = {"lr": "auto", "weight_decay": "auto", "betas": "auto", "eps": "auto", "adamw_lr": 1e-3}


def run_example(folder: str, stage: int, out: Path, *options: str) -> dict[str, Any]:
    """Runs an example in two processes with the ZeRO stage of its JSON file set to ``stage``."""
    example = ROOT / "examples" / folder
    config = json.loads((example / "ds_config.json").read_text())
    config["zero_optimization"]["stage"] = stage
    (out / "ds_config.json").write_text(json.dumps(config))
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command = ["tests.integrations.example_rank", str(out / "report.json"), str(example / "train.py")]
    result = subprocess.run(
        [*starter, *command, "--deepspeed", str(out / "ds_config.json"), *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"},
        timeout=TIMEOUT_SECONDS,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-9000:]
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    assert report["stage"] == stage
    return report


def check_grouping(report: dict[str, Any]) -> None:
    assert report["optimizer"] == "muon_dist.integrations.deepspeed.DistOrthogonal"
    assert len(report["algorithms"]) == 21
    for name, algorithm in report["algorithms"].items():
        assert algorithm == ("muon" if "_proj" in name else "adamw"), name
    (muon, *_), (adamw, decay, decayed), (adamw_too, no_decay, vectors) = report["groups"]
    assert (muon, adamw, adamw_too) == ("muon", "adamw", "adamw")
    assert (decay, decayed) == (0.1, ["model.embed_tokens.weight", "lm_head.weight"])
    assert no_decay == 0
    assert all("norm" in name for name in vectors)


def test_the_trainer_example_trains_with_dist_muon(tmp_path: Path) -> None:
    options = ["--max_steps", "12", "--logging_steps", "3", "--disable_tqdm", "true", "--output_dir", str(tmp_path)]
    report = run_example("huggingface_deepspeed", 2, tmp_path, *options)
    check_grouping(report)
    assert report["losses"][-1] < report["losses"][0] - 0.5


def test_the_accelerate_example_trains_with_dist_muon(tmp_path: Path) -> None:
    report = run_example("accelerate_deepspeed", 3, tmp_path, "--steps", "12")
    check_grouping(report)
    assert report["losses"][-1] < report["losses"][0] - 0.5


class LearningRates(TrainerCallback):
    """Those of all groups, after every step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seen.append([group["lr"] for group in kwargs["optimizer"].param_groups])


def make_trainer(
    folder: Path, optimizer: dict[str, Any] | None, client: Any = None, stage: int = 2, **options: Any
) -> Trainer:
    """A Trainer of a Llama with biases, with a JSON entry for the optimizer or with ``client(model)``."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
    }
    if optimizer is not None:
        config["optimizer"] = {"type": "DistMuon", "params": optimizer}
    arguments = TrainingArguments(
        output_dir=str(folder),
        deepspeed=config,
        learning_rate=1e-2,
        weight_decay=0.2,
        adam_beta1=0.8,
        adam_beta2=0.9,
        adam_epsilon=1e-6,
        max_steps=4,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    set_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            attention_bias=True,
            tie_word_embeddings=False,
        )
    )
    tokens = torch.arange(8 * 32).remainder(32).view(32, 8)
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        optimizer_cls_and_kwargs=client(model) if client else None,
    )


def optimizer_of(trainer: Trainer) -> DistOrthogonal:
    engine: Any = trainer.model_wrapped
    assert isinstance(engine.basic_optimizer, DistOrthogonal)
    return engine.basic_optimizer


@pytest.mark.parametrize("stage", [2, 3])
def test_the_trainer_fills_in_auto_and_its_schedule_scales_each_groups_own_peak(stage: int, tmp_path: Path) -> None:
    def observe(rank: int) -> tuple[list[dict[str, Any]], list[list[float]]]:
        trainer = make_trainer(tmp_path, JSON_OPTIONS, stage=stage, lr_scheduler_type="linear")
        rates = LearningRates()
        trainer.add_callback(rates)
        trainer.train()
        keys = ("algorithm", "weight_decay", "betas", "eps")
        return [{key: group[key] for key in keys} for group in optimizer_of(trainer).param_groups], rates.seen

    for (muon, adamw), rates in run_ranks(2, observe):
        assert (muon["algorithm"], adamw["algorithm"]) == ("muon", "adamw")
        assert (muon["weight_decay"], adamw["weight_decay"]) == (0.2, 0)
        assert (tuple(adamw["betas"]), adamw["eps"]) == ((0.8, 0.9), 1e-6)
        torch.testing.assert_close(rates, [[1e-2 * left / 4, 1e-3 * left / 4] for left in (3, 2, 1, 0)])


def test_the_trainer_names_a_value_that_it_cannot_fill_in(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"optimizer\.params\.adamw_lr"):
        run_ranks(2, lambda rank: make_trainer(tmp_path, {"lr": "auto", "adamw_lr": "auto"}).train())


def test_norms_and_biases_are_not_decayed_though_the_trainer_passes_one_list(tmp_path: Path) -> None:
    def train(rank: int) -> list[tuple[str, Tensor, Tensor]]:
        options = {**JSON_OPTIONS, "adamw_lr": 1e-2, "adamw_weight_decay": 0.1}
        trainer = make_trainer(tmp_path, options, lr_scheduler_type="constant")
        model: Any = trainer.model
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)  # biases begin at zero
        before = [p.clone() for p in model.parameters()]
        # Without gradients, weight decay is all that is left of a step.
        trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: 0 * outputs.logits.sum()
        trainer.train()
        return [(name, old, p.detach()) for (name, p), old in zip(model.named_parameters(), before, strict=True)]

    for name, before, after in run_ranks(2, train)[0]:
        decay = {"_proj.weight": 1e-2 * 0.2, "embed_tokens.weight": 1e-2 * 0.1, "lm_head.weight": 1e-2 * 0.1}
        rate = next((rate for end, rate in decay.items() if name.endswith(end)), 0.0)
        torch.testing.assert_close(after, before * (1 - rate) ** 4, msg=name)
        assert rate or torch.equal(after, before)


def test_a_class_given_to_the_trainer_knows_names_if_it_is_given_named_parameters(tmp_path: Path) -> None:
    def train(rank: int) -> dict[str, str]:
        def client(model: Any) -> tuple[type, dict[str, Any]]:
            return DistOrthogonal, {"params": model.named_parameters(), "lr": 1e-2}

        trainer = make_trainer(tmp_path, None, client)
        trainer.train()
        return {a.name: a.algorithm for a in optimizer_of(trainer).grouping()}

    for algorithms in run_ranks(2, train):
        for name, algorithm in algorithms.items():
            assert algorithm == ("muon" if name.endswith("_proj.weight") else "adamw"), name
