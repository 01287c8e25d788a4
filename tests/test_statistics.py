"""Statistics of a step: what they say, that they change nothing and wait for nothing; traces; the description."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from muon_dist import DistMuon
from tests.ranks import run_ranks
from tests.test_sharded import LAYOUTS, SHAPES, replicated, values, whole

LR = 0.5
Shapes = dict[str, tuple[int, ...]]


def train(layout: Callable[[Tensor], Tensor], observing: bool, **options: Any) -> tuple[dict[str, Any], DistMuon]:
    """Two steps of matrices alone, the last with zero gradients for one of them; weights before and after the last."""
    shapes: Shapes = {name: shape for name, shape in SHAPES.items() if len(shape) == 2 and "embed" not in name}
    parameters = {name: nn.Parameter(layout(value)) for name, value in values(shapes, 0).items()}
    optimizer = DistMuon(list(parameters.items()), lr=LR, weight_decay=0.0, chunk_bytes=40_000, wire="fp32", **options)
    optimizer.observer.observing = observing
    before: dict[str, Tensor] = {}
    for step in range(2):
        before = {name: whole(p).clone() for name, p in parameters.items()}
        for name, gradient in values(shapes, 1 + step).items():
            parameters[name].grad = layout(gradient)
        optimizer.step()
    return {name: (before[name], whole(p).clone()) for name, p in parameters.items()}, optimizer


def test_statistics_are_what_the_weights_and_the_state_say() -> None:
    fp32, exact = train(replicated(), True, momentum_state="fp32")
    weights, optimizer = train(replicated(), True, momentum_state="int4")
    unwatched, _ = train(replicated(), False, momentum_state="int4")
    assert all(torch.equal(after, unwatched[name][1]) for name, (_, after) in weights.items())

    found = {name: float(value) for name, value in exact.observer.latest.items()}
    updates = {name: (after - before).double() for name, (before, after) in fp32.items()}
    elements = sum(update.numel() for update in updates.values())
    rms = math.sqrt(sum(float(update.square().sum()) for update in updates.values()) / elements)
    momenta = [state["momentum_buffer"].double() for state in exact.state.values()]
    residuals = []
    for update in updates.values():
        rows, cols = update.shape
        factor = update / (LR * math.sqrt(max(1, rows / cols)))
        singular = torch.linalg.svdvals(factor)
        residuals.append(float((singular.square() - 1).square().sum().sqrt()) / math.sqrt(min(rows, cols)))
    assert found["update_rms"] == pytest.approx(rms, rel=1e-4)
    assert found["momentum_norm"] == pytest.approx(math.sqrt(sum(float(m.square().sum()) for m in momenta)), rel=1e-5)
    assert found["polar_residual"] == pytest.approx(sum(residuals) / len(residuals), rel=1e-3)
    assert found["quantisation_error"] == 0
    assert 0.05 < float(optimizer.observer.latest["quantisation_error"]) < 0.3  # four bits


@pytest.mark.parametrize("name", ["fsdp x3", "hsdp 2x2", "hsdp, columns too 2x2x2", "ddp x2"])
def test_all_ranks_have_the_statistics_of_a_single_process(name: str) -> None:
    ranks, make_layout = LAYOUTS[name]
    options: dict[str, Any] = {"momentum_state": "bf16"}
    _, reference = train(replicated(), True, **options)

    def observe(rank: int) -> dict[str, float]:
        _, optimizer = train(make_layout(), True, **options)
        return {key: float(value) for key, value in optimizer.observer.latest.items()}

    expected = {key: float(value) for key, value in reference.observer.latest.items()}
    for found in run_ranks(ranks, observe):
        assert found == pytest.approx(expected, rel=1e-5)


class Waits(TorchDispatchMode):
    """Counts the operators that bring a number to the host."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_watched_step_brings_no_number_to_the_host_and_names_its_phases() -> None:
    parameters = {name: nn.Parameter(value) for name, value in values(SHAPES, 0).items()}
    optimizer = DistMuon(list(parameters.items()))
    optimizer.observer.observing = True
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    with Waits() as waits:
        optimizer.step()
    assert waits.count == 0
    with profile() as profiler:
        optimizer.step()
    names = {event.key for event in profiler.key_averages()}
    assert {f"muon_dist.{x}" for x in ("accumulate", "gather", "polar", "scatter", "apply", "adamw")} <= names


def test_the_description_has_groups_state_layout_and_plan() -> None:
    def describe(_: int) -> str:
        _, make_layout = LAYOUTS["fsdp x2"]
        layout = make_layout()
        shapes: Shapes = {"a.weight": (64, 32), "b.weight": (64, 32), "embed_tokens.weight": (10, 4)}
        named = [(name, nn.Parameter(layout(value))) for name, value in values(shapes, 0).items()]
        return DistMuon(named).describe()

    first, _ = run_ranks(2, describe)
    assert [line.split(":")[0] for line in first.splitlines()] == [
        "groups",
        "    muon       2 parameters",
        "    adamw      1 parameters",
        "state on this rank",
        "    momentum_buffer  linear8       2 tensors            2,176 B",
        "    exp_avg          fp32          1 tensors               80 B",
        "    exp_avg_sq       fp32          1 tensors               80 B",
        "    step             fp32          1 tensors                4 B",
        "matrices of ranks 0 to 1",
        "    64 x 32",
        "plan",
        "    owners",
        "    chunks",
        "    buffers 8,192 B, polar factors 28,672 B, for a step",
        "    sent 4,096 B a step, as bf16; 688,128 FLOPs of polar factors",
    ]
    assert "2 matrices in 2 pieces; here 32 x 32" in first
    assert "1 matrices a rank, 1 here" in first
