"""The single process against torch's own optimizers: torch.optim.Muon and torch.optim.AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muon_dist import DistMuon

SHAPES = [(64, 64), (96, 40), (40, 96), (33, 70), (1, 16)]
STEPS = 20
SETTINGS: dict[str, Any] = {"lr": 2e-2, "momentum": 0.95, "weight_decay": 0.1}


def copies(shapes: Sequence[tuple[int, ...]]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    return ours, [nn.Parameter(p.detach().clone()) for p in ours]


def run_both(ours: list[nn.Parameter], theirs: list[nn.Parameter], *optimizers: torch.optim.Optimizer) -> None:
    for _ in range(STEPS):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize(("adjust_lr_fn", "update_scale"), [("original", "spectral"), ("match_rms_adamw",) * 2])
@pytest.mark.parametrize("nesterov", [True, False])
def test_fp32_momentum_and_jordan_coefficients_are_torch_muon(
    adjust_lr_fn: str, update_scale: Any, nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch's iteration is hard-wired to bf16; run it, unchanged otherwise, in fp32. (Its copy matters: it divides in
    # place.)
    monkeypatch.setattr(Tensor, "bfloat16", lambda tensor: tensor.clone())
    ours, theirs = copies(SHAPES)
    start = [p.detach().clone() for p in ours]
    mine = DistMuon(
        [{"params": ours, "algorithm": "muon"}],
        **SETTINGS,
        nesterov=nesterov,
        update_scale=update_scale,
        momentum_state="fp32",
        polar="jordan",
        wire="fp32",
    )
    reference = torch.optim.Muon(theirs, **SETTINGS, nesterov=nesterov, adjust_lr_fn=adjust_lr_fn)
    run_both(ours, theirs, mine, reference)
    for p, q, before in zip(ours, theirs, start, strict=True):
        assert float((p - q).norm() / (q - before).norm()) < 2e-5


def test_in_its_own_bf16_torch_muon_is_as_near_as_bf16_is() -> None:
    ours, theirs = copies(SHAPES)
    start = [p.detach().clone() for p in ours]
    mine = DistMuon([{"params": ours, "algorithm": "muon"}], **SETTINGS, momentum_state="fp32", polar="jordan")
    run_both(ours, theirs, mine, torch.optim.Muon(theirs, **SETTINGS))
    for p, q, before in zip(ours, theirs, start, strict=True):
        assert float((p - q).norm() / (q - before).norm()) < 0.03


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_adamw_part_is_torch_adamw(weight_decay: float) -> None:
    ours, theirs = copies([(50, 12), (7,), ()])
    options: dict[str, Any] = {
        "adamw_lr": 1e-2,
        "adamw_betas": (0.9, 0.99),
        "adamw_eps": 1e-6,
        "adamw_weight_decay": weight_decay,
    }
    mine = DistMuon([{"params": ours, "algorithm": "adamw"}], **options)
    reference = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=weight_decay, fused=True)
    run_both(ours, theirs, mine, reference)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("cols", [64, 150])
def test_8_bit_adamw_stays_near_fp32_also_in_several_slices(cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muon_dist.adamw._SLICE_ELEMENTS", 1000)
    ours, theirs = copies([(100, cols)])
    start = ours[0].detach().clone()
    mine = DistMuon([("embed.weight", ours[0])], adamw_state="dynamic8")
    run_both(ours, theirs, mine, torch.optim.AdamW(theirs, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0))
    state = mine.state[ours[0]]
    assert float(state["step"]) == STEPS
    assert {t.dtype for key, t in state.items() if key.endswith("codes")} == {torch.uint8}
    assert float((ours[0] - theirs[0]).norm() / (theirs[0] - start).norm()) < 0.05


def test_gradients_and_weights_may_have_any_strides() -> None:
    ours, theirs = copies([(40, 24)])
    turned = nn.Parameter(ours[0].detach().mT.contiguous().mT)
    for algorithm in ("muon", "adamw"):
        pair = [nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in (turned, theirs[0])]
        for p in pair:
            torch.manual_seed(0)
            p.grad = torch.randn(24, 40).mT if p is pair[0] else torch.randn(24, 40).mT.contiguous()
            DistMuon([{"params": [p], "algorithm": algorithm}]).step()
        assert pair[0].stride() != pair[1].stride()
        assert torch.equal(*pair)


def test_bf16_parameters_are_updated_in_fp32_arithmetic() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(32, 48).bfloat16())
    q = nn.Parameter(p.detach().float())
    for parameter in (p, q):
        parameter.grad = torch.ones_like(parameter) + torch.eye(32, 48).to(parameter.dtype)
        DistMuon([("w", parameter)], momentum_state="fp32", wire="fp32").step()
    assert torch.equal(p, q.bfloat16())


def test_schedulers_drive_every_group() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = DistMuon(model.named_parameters(), lr=0.02, adamw_lr=0.001)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert {g["algorithm"]: g["lr"] for g in optimizer.param_groups} == {"muon": 0.01, "adamw": 0.0005}
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=10)


def test_a_closure_is_called_once_with_gradients_enabled() -> None:
    model = nn.Linear(8, 8)
    optimizer = DistMuon(model.named_parameters())
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        loss = model(torch.ones(1, 8)).square().sum()
        loss.backward()
        return float(loss)

    before = model.weight.detach().clone()
    loss = optimizer.step(closure)
    assert loss is not None
    assert loss > 0
    assert calls == [True]
    assert not torch.equal(model.weight, before)


def test_a_step_without_gradient_signal_changes_nothing_but_creates_the_state() -> None:
    """torch.distributed.checkpoint makes state by a step with zero gradients and a learning rate of 0."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Embedding(4, 8))
    optimizer = DistMuon(model.named_parameters())
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(optimizer.state[p] for p in model.parameters())
