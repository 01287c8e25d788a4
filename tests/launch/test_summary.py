"""The comparison of runs, from hand-made run folders with known figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from muon_dist.launch.summary import load_runs, plot, summarise, table, write_records


def write_run(folder: Path, optimizer: str, momentum_state: str, steps: int, loss: float, state: int) -> None:
    folder.mkdir(parents=True)
    config = {"optimizer": optimizer, "momentum_state": momentum_state, "model": "tiny", "engine": "fsdp2"}
    result = {
        "config": config,
        "steps": steps,
        "seconds": 12.3,
        "world_size": 2,
        "device": "cpu",
        "parameters": 1000,
        "validation_loss": loss,
        "state_bytes_per_rank": {"measured": state, "estimated": state + 1},
        "versions": {"torch": "2.13.0"},
        "platform": "somewhere",
    }
    (folder / "result.json").write_text(json.dumps(result))
    records = [{"kind": kind, "step": step, "loss": loss} for step in (1, steps) for kind in ("train", "eval")]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(tmp_path / "linear8", "dist_muon", "linear8", steps=400, loss=1.5 * 1.002, state=1100)
    write_run(tmp_path / "fp32", "dist_muon", "fp32", steps=400, loss=1.5, state=4000)
    write_run(tmp_path / "adamw", "adamw", "linear8", steps=3, loss=5.0, state=8000)
    return tmp_path


def test_summary(folder: Path) -> None:
    summary = summarise(load_runs(folder))
    assert summary["relative_difference_to_fp32"] == {"linear8": pytest.approx(0.002)}
    assert summary["runs"]["fp32"]["validation_loss"] == 1.5
    assert {name: run["state_bytes_per_rank"]["measured"] for name, run in summary["runs"].items()} == {
        "linear8": 1100,
        "fp32": 4000,
        "adamw": 8000,
    }


def test_table_compares_only_runs_of_equal_length(folder: Path) -> None:
    rows = {line.split("  ")[0]: line for line in table(load_runs(folder)).splitlines()}
    assert "+0.20%" in rows["dist_muon linear8"]
    assert "5.0000" not in rows["adamw"]
    assert "8,000 B" in rows["adamw"]


def test_deepspeeds_optimizers_are_named_and_nothing_is_estimated(folder: Path) -> None:
    path = folder / "adamw" / "result.json"
    run = json.loads(path.read_text())
    run["ds_config"] = {"optimizer": {"type": "AdamW"}}
    run["state_bytes_per_rank"]["estimated"] = None
    path.write_text(json.dumps(run))
    (row,) = [line for line in table(load_runs(folder)).splitlines() if line.startswith("deepspeed AdamW")]
    assert row.split()[-3:] == ["8,000", "B", "-"]


def test_plot_is_written(folder: Path) -> None:
    plot(load_runs(folder), folder / "loss.png")
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_records_of_all_runs_are_in_one_file(folder: Path) -> None:
    write_records(load_runs(folder), folder / "metrics.jsonl")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {record["run"] for record in records} == {"linear8", "fp32", "adamw"}
    assert len(records) == 12


def test_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no finished run"):
        load_runs(tmp_path)
