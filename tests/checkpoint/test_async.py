"""A save in the background is a save: the state of its moment, sealed, whatever training does meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muon_dist import DistMuon
from muon_dist.checkpoint import async_save, load_state, save
from muon_dist.checkpoint.storage import write
from muon_dist.sharding import local
from tests.checkpoint.test_portable import make, network, tensors, trained
from tests.ranks import run_ranks


def step(model: nn.Module, optimizer: DistMuon) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 40)).square().mean().backward()
    optimizer.step()


def here(optimizer: DistMuon) -> list[Tensor]:
    """This rank's part of the state."""
    return [local(tensor).clone() for tensor in tensors(optimizer)]


def test_training_goes_on_while_the_state_of_the_moment_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two ranks, whose threads are held up until training has gone on with collectives of its own."""

    def run(rank: int) -> None:
        model = network()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizer = make(model, adamw_state="dynamic8")
        gone_on = threading.Event()

        def write_late(*arguments: Any) -> None:
            assert gone_on.wait(30)
            write(*arguments)

        monkeypatch.setattr(save, "write", write_late)
        step(model, optimizer)
        first = here(optimizer)
        saving = async_save(optimizer, tmp_path / "first")
        for _ in range(3):
            step(model, optimizer)
        second = here(optimizer)
        assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a.numel())
        assert not saving.done()
        gone_on.set()
        last = async_save(optimizer, tmp_path / "second")  # waits for the first
        assert saving.done()
        step(model, optimizer)
        last.result()
        for name, state in (("first", first), ("second", second)):
            report = load_state(optimizer, tmp_path / name)
            assert (report.moved, report.encoded) == ((), {})
            assert all(torch.equal(a, b) for a, b in zip(here(optimizer), state, strict=True))

    run_ranks(2, run)


def test_what_goes_wrong_is_raised_and_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = trained()
    async_save(optimizer, tmp_path / "old").result()
    with pytest.raises(ValueError, match="old exists already"):
        async_save(optimizer, tmp_path / "old")

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as broken:
        broken.setattr(save, "write", fail)
        saving = async_save(optimizer, tmp_path / "new")
        with pytest.raises(OSError, match="no space left"):
            saving.result()
    assert not (tmp_path / "new").exists()
    with pytest.raises(OSError, match="no space left"):  # who never asked is told by the next save
        async_save(optimizer, tmp_path / "new")
    async_save(optimizer, tmp_path / "new").result()
    for name in ("old", "new"):
        loaded = make(network())
        load_state(loaded, tmp_path / name)
        assert all(torch.equal(a, b) for a, b in zip(tensors(loaded), tensors(optimizer), strict=True))
