"""The command line: what cannot run says so in one line, before anything is written."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from muon_dist.launch.cli import main
from muon_dist.launch.environment import LAUNCHER_VARIABLES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--optimizer sgd", "invalid choice: 'sgd'"),
        ("--steps 0", "--steps is 0; it must be at least 1"),
        ("--engine ddp --replicas 2", "--replicas is for --engine fsdp2"),
        ("--replicas 2", "--replicas 2 does not divide the 1 ranks"),
        ("--batch-size 9 --accumulation-steps 2", "use a multiple of 2"),
        ("--during-backward", "add --clip-norm inf"),
        ("--during-backward --engine ddp", "--during-backward is for --optimizer dist_muon with --engine fsdp2"),
        ("--data /nowhere --hf-dataset name", "give one of them"),
        ("--data /nowhere", "/nowhere: no such file or folder"),
    ],
)
def test_wrong_options(
    options: str, message: str, tmp_path: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [] if "--data" in options else ["--data", str(text_folder)]
    with pytest.raises(SystemExit) as exit:
        main(["train", "--model", "nano", "--out", str(tmp_path / "run"), *data, *options.split()])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_half_of_torchruns_variables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(["train"])
    assert "RANK, WORLD_SIZE set but LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing" in capsys.readouterr().err


def test_a_rank_that_is_no_number(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.setenv(name, "x")
    with pytest.raises(SystemExit):
        main(["train"])
    assert "RANK='x' is no number" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("mpi4py", "message"),
    [
        (None, "mpi4py does not import"),
        (SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=SimpleNamespace(size=1))), "MPI library sees 1"),
    ],
)
def test_mpirun_without_its_mpi4py(
    mpi4py: object, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    monkeypatch.setitem(sys.modules, "mpi4py", mpi4py)
    with pytest.raises(SystemExit):
        main(["train"])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_srun_without_a_launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    with pytest.raises(SystemExit):
        main(["train"])
    assert "srun started 16 processes" in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit):
        main(["train", "--out", str(tmp_path)])
    assert "already holds a run; add --resume" in capsys.readouterr().err
