"""Runs of the real command in processes of its own, on a small text of a few files."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from muon_dist.launch.environment import free_port

Launch = Callable[..., "subprocess.CompletedProcess[str]"]

TIMEOUT_SECONDS = 60
STEPS = 6


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    words = [
        "def",
        "return",
        "if",
        "else",
        "for",
        "in",
        "import",
        "class",
        "self",
        "None",
        "x",
        "y",
        "=",
        "(",
        ")",
        ":",
    ]
    generator = random.Random(0)
    for index in range(6):
        path = folder / f"package{index % 2}" / f"module{index}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(" ".join(generator.choice(words) for _ in range(600)))
    return folder


@pytest.fixture(scope="session")
def launch(text_folder: Path) -> Launch:
    """`launch(out, *options, ranks=2)`: train the smallest model for a few steps, by a launcher if ranks > 1."""

    def run(out: Path, *options: str, ranks: int, launcher: str = "torchrun") -> subprocess.CompletedProcess[str]:
        starter = [sys.executable, "-m"]
        if ranks > 1:
            starter = starters(ranks)[launcher]
        finished = subprocess.run(
            [*starter, "muon_dist.launch", "train", "--out", str(out), *small_options(text_folder), *options],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            timeout=TIMEOUT_SECONDS,
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished

    return run


def small_options(text_folder: Path) -> list[str]:
    """Of the smallest model."""
    small = f"--model nano --sequence-length 32 --batch-size 8 --eval-sequences 5 --log-every 1 --data {text_folder}"
    return small.split()


def starters(ranks: int) -> dict[str, list[str]]:
    """How each launcher is told to start a module."""
    python = [sys.executable, "-m"]
    return {
        "torchrun": [*python, "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"],
        "deepspeed": [
            *python,
            "deepspeed.launcher.runner",
            f"--num_gpus={ranks}",
            f"--master_port={free_port()}",
            "--module",
        ],
    }


@pytest.fixture(scope="session")
def fsdp2_run(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that others are compared to."""
    out = tmp_path_factory.mktemp("runs") / "fsdp2"
    options = f"--engine fsdp2 --optimizer dist_muon --steps {STEPS} --checkpoint-every 2 --eval-every 3"
    launch(out, *options.split(), ranks=2)
    return out
