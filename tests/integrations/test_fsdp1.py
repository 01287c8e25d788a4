"""FSDP1: parameters that are runs of flat buffers. test_matrices.py holds it against other engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from muon_dist import DistMuon
from muon_dist.integrations.fsdp1 import FlatDistMuon
from muon_dist.options import MomentumState
from muon_dist.shards import Shard
from muon_dist.state import StoredTensor
from tests.integrations.layouts import Trainer, batch
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")

OPTIONS: dict[str, Any] = {"lr": 1e-2, "adamw_lr": 3e-3, "wire": "fp32", "block_size": 16}


def wrapped(module: nn.Module, **options: Any) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **options)


@pytest.mark.parametrize("codec", ["linear8", "lowrank4"])
def test_portable_state_goes_on_bit_for_bit_and_moves(codec: MomentumState, tmp_path: Path) -> None:
    options = {**OPTIONS, "momentum_state": codec, "adamw_state": "dynamic8"}

    def run(rank: int) -> None:
        first = Trainer.of("FSDP1 x2", options)
        first.train(range(3))
        saved = first.weights()
        first.save(tmp_path / "state")
        first.train(range(3, 5))
        for layout in ("FSDP1 x2", "FSDP2 x2", "ZeRO-2 x2"):
            other = Trainer.of(layout, options, saved)
            report = other.load(tmp_path / "state")
            assert not report.skipped
            if layout == "FSDP1 x2":
                assert not (*report.moved, *report.encoded)
                other.train(range(3, 5))
                for name, found in other.weights().items():
                    assert torch.equal(found, first.weights()[name]), name
            other.save(tmp_path / layout)
            assert not Trainer.of("FSDP1 x2", options, saved).load(tmp_path / layout).skipped

    run_ranks(2, run)


@pytest.mark.parametrize(("ranks", "codec"), [(2, "fp32"), (3, "linear8")])
def test_torch_checkpoints_hold_decoded_state(ranks: int, codec: MomentumState) -> None:
    """Loaded it trains as what was saved, to the error of encoding linear8 anew. (Sharded state: whole states that
    torch 2.13 gathers on CPU are all the same memory, those of its own AdamW too.)"""

    def run(rank: int) -> None:
        options = {**OPTIONS, "momentum_state": codec}
        first = Trainer.of(f"FSDP1 x{ranks}", options)
        first.train(range(3))
        saved = first.weights()
        state: dict[str, Any] = get_optimizer_state_dict(first.model, first.optimizer)
        assert all(v.dtype == torch.float32 for entry in state["state"].values() for v in entry.values())
        first.train(range(3, 6))
        second = Trainer.of(f"FSDP1 x{ranks}", options, saved)
        set_optimizer_state_dict(second.model, second.optimizer, state)
        counts = {name: float(s.decode(p.state)) for name, p, s in states(second.optimizer) if s.label == "step"}
        assert set(counts.values()) == {3.0}  # on ranks with an empty run too
        second.train(range(3, 6))
        for name, found in second.weights().items():
            theirs = first.weights()[name]
            bound = 0.02 if codec == "linear8" else 0.0
            assert float((found - theirs).norm()) <= bound * float((theirs - saved[name]).norm()), name

    run_ranks(ranks, run)


def states(optimizer: DistMuon) -> Iterator[tuple[str, Shard, StoredTensor]]:
    for shard, stored in optimizer.bound().stored():
        yield shard.name, shard, stored


def test_what_it_cannot_read_is_refused_with_the_reason() -> None:
    def run(rank: int) -> None:
        with pytest.raises(ValueError, match=r"weight, bias: FSDP has put them into one.*use_orig_params=True"):
            FlatDistMuon(wrapped(nn.Linear(8, 8)))
        model = wrapped(nn.Linear(8, 8), use_orig_params=True)
        with pytest.raises(ValueError, match=r"_fsdp_wrapped_module.weight: an engine has flattened it.*integrations"):
            DistMuon(model.named_parameters())
        optimizer = FlatDistMuon(model)
        with pytest.raises(NotImplementedError, match=r"during_backward\(\): FSDP1 hands out gradients when"):
            optimizer.during_backward()
        with FullyShardedDataParallel.summon_full_params(model), pytest.raises(ValueError, match="has gathered it"):
            optimizer.step()
        state = optimizer.state_dict()
        state["state"][0]["momentum_buffer"] = torch.zeros(3)
        with pytest.raises(ValueError, match="weight: the state has 3 elements of momentum_buffer, (28|36) are"):
            optimizer.load_state_dict(state)

    run_ranks(2, run)


def test_replicas_without_shards_and_hybrid_shards_end_alike() -> None:
    def run(rank: int) -> list[dict[str, torch.Tensor]]:
        found = []
        for strategy in (ShardingStrategy.NO_SHARD, ShardingStrategy.HYBRID_SHARD, ShardingStrategy.FULL_SHARD):
            torch.manual_seed(0)
            groups: Any = None
            if strategy is ShardingStrategy.HYBRID_SHARD:
                groups = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s"))
            model = nn.Sequential(nn.Embedding(97, 12), nn.Linear(12, 20), nn.Linear(20, 97))
            fsdp = wrapped(model, use_orig_params=True, sharding_strategy=strategy, device_mesh=groups)
            optimizer = FlatDistMuon(fsdp, **OPTIONS, momentum_state="fp32")
            for step in range(3):
                nn.functional.cross_entropy(fsdp(batch(step)).flatten(0, 1), batch(step + 1).flatten()).backward()
                optimizer.step()
                optimizer.zero_grad()
            with FullyShardedDataParallel.summon_full_params(fsdp):
                found.append({name: p.detach().clone() for name, p in fsdp.named_parameters()})
        return found

    everyones = run_ranks(4, run)
    reference = everyones[0][2]
    for found in everyones:
        for strategy, weights in enumerate(found):
            for name, value in weights.items():
                assert torch.equal(value, everyones[0][strategy][name])
                torch.testing.assert_close(value, reference[name], rtol=0, atol=1e-5)
