"""What DeepSpeed saved becomes a portable checkpoint in one process, the same that the engine would have written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from muon_dist import DistMuon
from muon_dist.checkpoint import load_state
from muon_dist.checkpoint.inspect import describe
from muon_dist.launch.cli import main
from muon_dist.options import MomentumState
from tests.integrations.layouts import Model, Trainer
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")


CODECS: dict[int, MomentumState] = {0: "linear8", 1: "nf4", 2: "lowrank4", 3: "linear8"}  # by stage


def options(stage: int) -> dict[str, Any]:
    return {"momentum_state": CODECS[stage], "adamw_state": "dynamic8", "block_size": 16}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every stage, by two ranks: DeepSpeed's own checkpoint, and the portable one of the same state."""
    folder = tmp_path_factory.mktemp("saved")

    def run(rank: int) -> None:
        for stage in CODECS:
            trainer = Trainer.of(f"ZeRO-{stage} x2", options(stage))
            trainer.train(range(2))
            trainer.module.save_checkpoint(str(folder / str(stage) / "deepspeed"), tag="second")
            trainer.save(folder / str(stage) / "portable")

    run_ranks(2, run)
    return folder


@pytest.mark.parametrize("stage", CODECS)
def test_it_is_what_the_engine_would_have_saved(stage: int, saved: Path, tmp_path: Path) -> None:
    portable, written = saved / str(stage) / "portable", saved / str(stage) / "deepspeed"
    main(["convert", str(written), str(tmp_path / "latest")])
    main(["convert", str(written / "second"), str(tmp_path / "tag")])
    if stage > 0:  # of stage 0 DeepSpeed writes the state of one rank alone
        assert describe(tmp_path / "latest") == describe(portable)
    states = []
    for folder in (portable, tmp_path / "latest", tmp_path / "tag"):
        optimizer = DistMuon(Model().named_parameters(), **{**options(stage), "momentum_state": "fp32"})
        load_state(optimizer, folder)
        states.append([t for state in optimizer.state.values() for t in state.values()])
    for other in states[1:]:
        assert all(torch.equal(a, b) for a, b in zip(states[0], other, strict=True))


def test_what_is_not_whole_or_not_ours_is_refused(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, target = tmp_path / "second", tmp_path / "converted"
    shutil.copytree(saved / "2" / "deepspeed" / "second", folder)
    files = sorted(folder.glob("*optim_states.pt"))
    whole = files[0].read_bytes()

    def refusal() -> str:
        with pytest.raises(SystemExit):
            main(["convert", str(folder), str(target)])
        assert not target.exists()
        return capsys.readouterr().err

    files[0].write_bytes(whole[: len(whole) // 2])
    assert f"{files[0]} cannot be read" in refusal()
    torch.save({"optimizer_state_dict": {"base_optimizer_state": {"state": {}}}}, files[0])
    assert "holds no state that DistMuon has described" in refusal()
    torch.save({"optimizer_state_dict": Harmful(tmp_path / "harmed")}, files[0])
    assert "holds no state" in refusal() or "cannot be read" in refusal()
    assert not (tmp_path / "harmed").exists()
    files[0].unlink()
    assert "the optimizer's state of 1 ranks, 2 wrote it" in refusal()


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)
