"""Numerical faults: gradients that are not finite leave no trace on any rank; GradScaler trains like the plain loop."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from muon_dist import DistMuon
from muon_dist.codecs import CODECS
from muon_dist.sharding import local, local_gradient
from tests.ranks import run_ranks


def everything(model: nn.Module, optimizer: DistMuon) -> list[torch.Tensor]:
    """Weights and state."""
    state = [t for s in optimizer.state.values() for t in s.values()]
    return [local(t).detach().clone() for t in (*model.parameters(), *state)]


@pytest.mark.parametrize("momentum_state", CODECS)
def test_nan_gradients_raise_by_name_or_are_skipped_and_nothing_changes(momentum_state: Any) -> None:
    for nonfinite in ("raise", "skip"):
        model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        optimizer = DistMuon(model.named_parameters(), nonfinite=nonfinite, momentum_state=momentum_state)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        before = everything(model, optimizer)
        model.get_parameter("1.weight").grad = torch.full((8,), float("nan"))
        if nonfinite == "raise":
            with pytest.raises(FloatingPointError, match=r"gradients of 1.weight hold NaN.*clip"):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.skipped_steps == 1
        assert all(torch.equal(a, b) for a, b in zip(everything(model, optimizer), before, strict=True))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 9), nn.LayerNorm(9), nn.Linear(9, 4))


def sharded_network(policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy or MixedPrecisionPolicy())
    return model


def test_nan_gradients_on_one_rank_raise_on_all() -> None:
    def check(rank: int) -> None:
        model = sharded_network()
        optimizer = DistMuon(model.named_parameters(), nonfinite="raise")
        model(torch.ones(4, 8)).square().mean().backward()
        if rank == 1:
            local_gradient(model.get_parameter("0.weight"))[0, 0] = float("inf")  # type: ignore[index]
        with pytest.raises(FloatingPointError, match="gradients of 0.weight"):
            optimizer.step()

    run_ranks(2, check)


def test_a_step_that_one_rank_cannot_take_is_skipped_by_all_and_might_not_have_been() -> None:
    def train(bad_step: int | None) -> list[torch.Tensor]:
        model = sharded_network()
        optimizer = DistMuon(model.named_parameters(), nonfinite="skip", wire="fp32")
        for step in range(4):
            if bad_step is None and step == 2:
                continue
            optimizer.zero_grad()
            model(torch.full((4, 8), 1.0 + step)).square().mean().backward()
            if step == bad_step and dist.get_rank() == 1:
                local_gradient(model.get_parameter("2.weight"))[0, 0] = float("nan")  # type: ignore[index]
            optimizer.step()
        assert optimizer.skipped_steps == (0 if bad_step is None else 1)
        return everything(model, optimizer)

    def check(rank: int) -> None:
        assert all(torch.equal(a, b) for a, b in zip(train(2), train(None), strict=True))

    run_ranks(2, check)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("engine", ["single", "FSDP2"])
def test_grad_scaler_trains_like_the_plain_loop_without_the_steps_that_overflow(engine: str, precision: str) -> None:
    """Scales are powers of two, so fp32 gives the same bits; fp16's gradients keep more digits when they are scaled."""
    half, sharded = precision == "fp16", engine == "FSDP2"
    overflows = 3
    policy = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32) if half else None

    def train(scaled: bool) -> list[torch.Tensor]:
        model = sharded_network(policy) if sharded else network()
        optimizer = DistMuon(model.named_parameters(), wire="fp32", momentum_state="fp32")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, growth_interval=2, enabled=scaled)
        scales = []
        for step in range(7):
            if step == overflows and not scaled:
                continue
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16) if half and not sharded else nullcontext():
                outputs = model(torch.full((4, 8), 1.0 + step)).float()
            scaler.scale(outputs.square().mean()).backward()
            if step == overflows and (not sharded or dist.get_rank() == 1):
                local_gradient(model.get_parameter("2.weight"))[0, 0] = float("inf")  # type: ignore[index]
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        if scaled:
            assert scales == [2.0**n for n in (6, 7, 7, 6, 6, 7, 7)]
        return everything(model, optimizer)

    def check(rank: int) -> None:
        for ours, plain in zip(train(scaled=True), train(scaled=False), strict=True):
            assert (ours - plain).norm() <= (1e-2 if half else 0.0) * plain.norm()

    run_ranks(2, check) if sharded else check(0)
