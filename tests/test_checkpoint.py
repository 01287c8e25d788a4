"""State survives: torch's own checkpoints keep codes as integers, resume bit for bit, and reshard without decoding."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from muon_dist import DistMuon
from muon_dist.codecs import CODECS
from muon_dist.options import MomentumState
from tests.ranks import run_ranks


class Experts(nn.Module):
    """All of them for every input, one after the other."""

    def __init__(self, count: int, size: int, hidden: int) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(count, hidden, size) / size)

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.experts.unbind():
            x = x + torch.relu(x @ weight.mT) @ weight
        return x


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {
        "0": nn.Linear(40, 33),
        "1": nn.LayerNorm(33),
        "2": nn.Unflatten(1, (3, 11)),
        "conv": nn.Conv1d(3, 5, 3, padding=1),
        "4": nn.Flatten(),
        "5": nn.Linear(55, 7),
        "6": Experts(5, 7, 12),
        "7": nn.Linear(7, 300),
    }
    return nn.Sequential(OrderedDict(layers))


def train(model: nn.Module, optimizer: DistMuon, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        torch.manual_seed(step)
        model(torch.randn(4, 40)).square().mean().backward()
        optimizer.step()


def make(model: nn.Module, codec: MomentumState) -> DistMuon:
    return DistMuon(model.named_parameters(), momentum_state=codec, adamw_state="dynamic8", block_size=32, wire="fp32")


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@pytest.mark.parametrize("codec", CODECS)
def test_a_resumed_run_is_the_uninterrupted_one(codec: MomentumState, tmp_path: Path) -> None:
    model = network()
    optimizer = make(model, codec)
    train(model, optimizer, range(3))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, optimizer, range(3, 6))

    resumed = network()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    fresh = make(resumed, codec)
    fresh.load_state_dict(saved["optimizer"])
    train(resumed, fresh, range(3, 6))
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
        assert {k: t.dtype for k, t in optimizer.state[p].items()} == {k: t.dtype for k, t in fresh.state[q].items()}


def sharded(mesh: DeviceMesh | None = None) -> nn.Module:
    model = network()
    fully_shard(model, mesh=mesh or init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def wrapped(kind: str, ranks: int) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(network())
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
        return sharded(mesh)
    return sharded()


def momenta(optimizer: DistMuon) -> list[Tensor]:
    groups = [g for g in optimizer.param_groups if g["algorithm"] == "muon"]
    return [whole(t) for g in groups for p in g["params"] for _, t in sorted(optimizer.state[p].items())]


@pytest.mark.parametrize("codec", ["fp32", "linear8"])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (("fsdp", 2), ("fsdp", 2)),
        (("fsdp", 2), ("fsdp", 3)),
        (("fsdp", 3), ("single", 1)),
        (("single", 1), ("fsdp", 2)),
        (("ddp", 2), ("fsdp", 3)),
        (("fsdp", 2), ("ddp", 2)),
    ],
    ids=lambda layout: f"{layout[0]} x{layout[1]}",
)
def test_dcp_reshards_codes_without_decoding_them(
    codec: MomentumState, source: tuple[str, int], target: tuple[str, int], tmp_path: Path
) -> None:
    def build(layout: tuple[str, int]) -> tuple[nn.Module, DistMuon]:
        kind, ranks = layout
        model = network() if kind == "single" else wrapped(kind, ranks)
        return model, make(model.module if isinstance(model, DistributedDataParallel) else model, codec)

    def save(rank: int) -> list[Tensor]:
        model, optimizer = build(source)
        train(model, optimizer, range(2))
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
        return momenta(optimizer)

    def load(rank: int) -> list[Tensor]:
        model, optimizer = build(target)
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        found = momenta(optimizer)
        train(model, optimizer, range(2, 3))
        return found

    saved = run_ranks(source[1], save)[0]
    for loaded in run_ranks(target[1], load):
        for ours, theirs in zip(loaded, saved, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


def test_state_follows_parameters_that_a_trainer_swaps() -> None:
    """Accelerate builds the optimizer on whole parameters and puts sharded ones into its groups afterwards."""

    def check(rank: int) -> None:
        model = network()
        optimizer = make(model, "linear8")
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        now = dict(model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [now[name] for name in group["param_names"]]
        train(model, optimizer, range(2))
        assert set(optimizer.state) == set(model.parameters())
        reference = sharded()
        train(reference, make(reference, "linear8"), range(2))
        assert all(
            torch.equal(whole(p), whole(q)) for p, q in zip(model.parameters(), reference.parameters(), strict=True)
        )

    run_ranks(2, check)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"momentum_state": "fp32"}, r"0.weight: the saved state has \['momentum_buffer'\].*momentum_state"),
        ({"block_size": 8}, r"0.weight: the saved momentum_buffer_scales is .*block_size"),
        ({"overrides": {"0.weight": "adamw"}}, "the saved state has the groups .*overrides"),
    ],
    ids=["codec", "block", "algorithm"],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(change: dict[str, Any], message: str) -> None:
    model = network()
    other = DistMuon(model.named_parameters(), **{"momentum_state": "linear8", "block_size": 32, **change})
    optimizer = DistMuon(model.named_parameters(), momentum_state="linear8", block_size=32)
    train(model, optimizer, range(1))
    before = [t.clone() for s in optimizer.state.values() for t in s.values()]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(other.state_dict())
    assert all(
        torch.equal(a, t)
        for a, t in zip(before, [t for s in optimizer.state.values() for t in s.values()], strict=True)
    )
