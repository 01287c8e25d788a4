"""State goes to torch's own optimizers and back as it is; what a checkpoint holds can be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon

from muon_dist import DistMuon
from muon_dist.checkpoint import load_state, save_state
from muon_dist.checkpoint.seal import begin, finish
from muon_dist.launch.cli import main
from tests.checkpoint.test_portable import make, momenta, network, trained


def torch_optimizers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim == 2]
    others = [(name, p) for name, p in model.named_parameters() if p.ndim != 2]
    return {"muon": Muon(matrices, lr=0.5), "adamw": AdamW(others, lr=0.25)}


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    model.zero_grad()
    model(torch.ones(4, 40)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def test_torchs_optimizers_load_it_and_go_on(tmp_path: Path) -> None:
    saved = trained(momentum_state="fp32", lr=0.1)
    save_state(saved, tmp_path / "state")
    main(["convert", str(tmp_path / "state"), str(tmp_path / "state.pt")])
    model = network()
    optimizers = torch_optimizers(model)
    for name, state in torch.load(tmp_path / "state.pt", weights_only=True).items():
        optimizers[name].load_state_dict(state)
    named = dict(model.named_parameters())
    for name, values in momenta(saved).items():
        assert torch.equal(optimizers["muon"].state[named[name]]["momentum_buffer"], values)
    for p in saved.bound().adamw:
        state = optimizers["adamw"].state[named[p.shard.name]]
        for stored in (p.exp_avg, p.exp_avg_sq, p.step):
            assert torch.equal(state[stored.label], stored.buffers(p.shard.state)[""])
    assert optimizers["muon"].param_groups[0]["lr"] == 0.1
    step(model, *optimizers.values())


def test_state_of_torchs_optimizers_is_loaded(tmp_path: Path) -> None:
    model = network()
    optimizers = torch_optimizers(model)
    for _ in range(2):
        step(model, *optimizers.values())
    torch.save({name: optimizer.state_dict() for name, optimizer in optimizers.items()}, tmp_path / "state.pt")
    main(["convert", str(tmp_path / "state.pt"), str(tmp_path / "state")])
    loaded = make(network(), momentum_state="fp32")
    report = load_state(loaded, tmp_path / "state")
    assert report.error == 0
    for (name, values), p in zip(momenta(loaded).items(), optimizers["muon"].param_groups[0]["params"], strict=True):
        assert torch.equal(values, optimizers["muon"].state[p]["momentum_buffer"]), name
    assert [group["lr"] for group in loaded.param_groups] == [0.5, 0.25]
    assert load_state(make(network(), momentum_state="linear8"), tmp_path / "state").error < 0.02


def test_stacks_are_not_for_torchs_muon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_state(DistMuon([("experts", nn.Parameter(torch.ones(3, 8, 8)))]), tmp_path / "state")
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "state"), str(tmp_path / "state.pt")])
    assert "experts has shape (3, 8, 8), and torch.optim.Muon takes matrices only" in capsys.readouterr().err
    assert not (tmp_path / "state.pt").exists()


def test_inspect_prints_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_state(trained(momentum_state="linear8"), tmp_path / "state")
    main(["inspect", str(tmp_path / "state")])
    printed = capsys.readouterr().out
    assert "0.weight   33x40  muon       momentum_buffer linear8        1       1,518" in printed
    assert "8 parameters, 7,759 bytes of state, saved by 1 rank" in printed
    assert "steps of AdamW: 2" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("inspect nowhere", "manifest.json: No such file or directory: no checkpoint"),
        ("inspect run", "this is a checkpoint of a run of muon-dist train"),
        ("convert nowhere there", "No such file or directory: 'nowhere'"),
        ("convert garbage there", "garbage cannot be read as a file of torch.save"),
        ("convert unnamed.pt there", "the parameters of 'muon' have no names"),
        ("convert half.pt there", "half.pt has no 'adamw'"),
    ],
)
def test_what_cannot_be_read_is_refused(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("garbage").write_bytes(b"garbage")
    finish(begin(Path("run"), None), Path("run"), {"step": 1}, None)
    optimizers = {name: optimizer.state_dict() for name, optimizer in torch_optimizers(network()).items()}
    torch.save({"muon": optimizers["muon"]}, "half.pt")
    for group in optimizers["muon"]["param_groups"]:
        del group["param_names"]
    torch.save(optimizers, "unnamed.pt")
    with pytest.raises(SystemExit):
        main(arguments.split())
    assert message in capsys.readouterr().err
    assert not Path("there").exists()
