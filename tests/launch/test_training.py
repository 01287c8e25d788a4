"""Whole runs: every engine trains alike, and a resumed run is the run that was never interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.launch.conftest import STEPS, Launch
from tests.launch.records import losses, result


def test_a_run_leaves_its_records(fsdp2_run: Path) -> None:
    train = losses(fsdp2_run, "train")
    assert list(train) == list(range(1, STEPS + 1))
    assert train[STEPS] < train[1]
    assert list(losses(fsdp2_run, "eval")) == [3, 6]
    assert sorted(path.name for path in (fsdp2_run / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (2, 4, 6)
    ]
    assert list((fsdp2_run / "tensorboard").iterdir())
    assert result(fsdp2_run)["world_size"] == 2
    assert result(fsdp2_run)["validation_loss"] == losses(fsdp2_run, "eval")[STEPS]


def test_resumed_equals_uninterrupted(launch: Launch, fsdp2_run: Path, tmp_path: Path) -> None:
    """As if killed after step 5, in the middle of writing a checkpoint and a record."""
    resumed = tmp_path / "resumed"
    shutil.copytree(fsdp2_run, resumed)
    (resumed / "checkpoints" / "step-00000006").rename(resumed / "checkpoints" / "step-00000006.unfinished")
    records = (resumed / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in records if json.loads(line)["step"] <= 5]
    (resumed / "metrics.jsonl").write_text("\n".join(kept) + '\n{"kind": "train", "st')

    options = f"--engine fsdp2 --optimizer dist_muon --steps {STEPS} --checkpoint-every 2 --eval-every 3 --resume"
    launch(resumed, *options.split(), ranks=2)

    assert result(resumed)["first_step"] == 5
    assert losses(resumed, "train") == losses(fsdp2_run, "train")
    assert losses(resumed, "eval") == losses(fsdp2_run, "eval")


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ("--engine ddp", 2),
        ("--engine ddp --accumulation-steps 2", 2),
        ("--engine fsdp2 --accumulation-steps 2 --replicas 2", 2),
        ("--engine single", 1),
    ],
)
def test_engines_train_alike(options: str, ranks: int, launch: Launch, fsdp2_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    launch(out, *options.split(), *f"--optimizer dist_muon --steps {STEPS} --eval-every 3".split(), ranks=ranks)
    assert losses(out, "train") == pytest.approx(losses(fsdp2_run, "train"), rel=1e-3)
    assert losses(out, "eval") == pytest.approx(losses(fsdp2_run, "eval"), rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "torch_muon"])
def test_other_optimizers(optimizer: str, launch: Launch, tmp_path: Path) -> None:
    launch(tmp_path / "run", "--engine", "single", "--optimizer", optimizer, "--steps", "4", ranks=1)
    train = losses(tmp_path / "run", "train")
    assert train[4] < train[1]
    state = result(tmp_path / "run")["state_bytes_per_rank"]
    assert state["measured"] == state["estimated"] > 0


def test_statistics_of_the_optimizer_go_to_all_records(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = "--engine single --steps 4 --statistics-every 2 --wandb project --during-backward --clip-norm inf"
    launch(tmp_path / "run", *options.split(), ranks=1)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [record for record in records if record["kind"] == "optimizer"]
    assert [record["step"] for record in found] == [2, 4]
    for record in found:
        assert record["update_rms"] > 0
        assert record["momentum_norm"] > 0
        assert 0 < record["quantisation_error"] < 0.02
        assert 0 < record["polar_residual"] < 1
    (local,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(local.glob("*.wandb"))
