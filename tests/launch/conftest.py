"""Runs of the real command in processes of its own, on a small text of a few files."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Launch = Callable[..., "subprocess.CompletedProcess[str]"]

TIMEOUT_SECONDS = 60


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
    """`launch(out, *options, ranks=2)`: train the smallest model for a few steps, under torchrun if ranks > 1."""

    def run(out: Path, *options: str, ranks: int) -> subprocess.CompletedProcess[str]:
        starter = [sys.executable, "-m"]
        if ranks > 1:
            starter += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
        small = (
            f"--model nano --sequence-length 32 --batch-size 8 --eval-sequences 5 --log-every 1 --data {text_folder}"
        )
        return subprocess.run(
            [*starter, "muon_dist.launch", "train", "--out", str(out), *small.split(), *options],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            timeout=TIMEOUT_SECONDS,
            capture_output=True,
            text=True,
            check=True,
        )

    return run
