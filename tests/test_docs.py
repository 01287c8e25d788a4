"""What the pages say to type works: every command in a ```bash block is collected and run, launchers emulated by forks.

Blocks of other languages (shell, python) are for GPUs, for files of the reader's, or excerpts. The site itself is built
by .ci/run.
"""

from __future__ import annotations

import configparser
import contextlib
import importlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch.distributed as dist

pytest.importorskip("accelerate")

# What ranks need, before they are forked.
import accelerate.data_loader  # noqa: F401
import lightning.pytorch  # noqa: F401
import torchtitan.models.llama3  # noqa: F401
import transformers  # noqa: F401

import tests.integrations.without_kernels  # noqa: F401
from muon_dist import DistMuon
from muon_dist.launch.cli import main
from muon_dist.launch.environment import LAUNCHER_VARIABLES, free_port
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


class Page(NamedTuple):
    name: str
    commands: list[str]


def pages() -> Iterator[Page]:
    for path in PAGES:
        blocks = re.findall(r"^```bash\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
        commands = [line for block in blocks for line in block.splitlines() if line]
        if commands:
            yield Page(str(path.relative_to(ROOT / "docs")), commands)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", list(pages()), ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("examples", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for command in page.commands:
        run(command)


def test_every_example_is_on_a_page() -> None:
    commands = "\n".join(command for page in pages() for command in page.commands)
    for example in (ROOT / "examples").glob("*/train.py"):
        assert str(example.relative_to(ROOT)) in commands


def run(command: str) -> None:
    words = shlex.split(command)
    if words[:2] == ["pip", "install"]:
        check_extras(words[2])
    elif words[:2] == ["torchrun", "--nproc-per-node"] and words[3] == "-m":
        assert words[4] == "muon_dist.launch"
        run_command(int(words[2]), words[5:])
    elif words[:2] == ["torchrun", "--nproc-per-node"]:
        run_example(int(words[2]), words[3:])
    elif words[0] == "muon-dist":
        run_command(1, words[1:])
    else:
        subprocess.run(command, shell=True, check=True, timeout=60)


def check_extras(requirement: str) -> None:
    """There are such extras."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    _, _, extras = requirement.removesuffix("]").partition("[")
    assert all(config.has_option("options.extras_require", extra) for extra in extras.split(",") if extra)


def run_command(ranks: int, words: list[str]) -> None:
    """`muon-dist`, as torchrun starts it, or alone."""
    port = free_port()

    def launched(rank: int) -> None:
        dist.destroy_process_group()
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
        if ranks == 1:
            for variable in LAUNCHER_VARIABLES:
                del os.environ[variable]
        main(words)

    run_ranks(ranks, launched)


def run_example(ranks: int, words: list[str]) -> None:
    """Its losses fall on every rank, and its hidden matrices are DistMuon's."""
    sharded = "fsdp2" in words[0] or "torchtitan" in words[0]

    def train(rank: int) -> tuple[list[float], dict[str, str], str]:
        if sharded:
            importlib.import_module("tests.integrations.accelerate_on_cpu")
        os.environ.update(TORCHELASTIC_RUN_ID="docs", LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="localhost")
        sys.argv = words
        with contextlib.redirect_stdout(io.StringIO()):
            trained, losses = runpy.run_path(words[0])["main"]()
        optimizer: DistMuon = getattr(trained, "basic_optimizer", trained)  # DeepSpeed's engine has it
        placements = {shard.description.rpartition(") (")[2] for shard in optimizer.bound().shards} if sharded else ()
        return losses, {a.name: a.algorithm for a in optimizer.grouping()}, str(placements)

    for losses, algorithms, placements in run_ranks(ranks, train, timeout=90):
        assert losses[-1] < losses[0] - 0.5
        hidden = ("_proj.weight", ".wq.weight", ".wk.weight", ".wv.weight", ".wo.weight", ".w1.weight", ".w2.weight")
        for name, algorithm in algorithms.items():
            assert algorithm == ("muon" if name.endswith((*hidden, ".w3.weight")) else "adamw"), name
        assert not sharded or placements == "{'Shard(dim=0),)'}"
