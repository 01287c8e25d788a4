"""Invariant 1: sharded equals whole, bit for bit with the fp32 wire, in every layout; replicas end identical."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from muon_dist import DistMuon
from muon_dist.memory import estimated_state_bytes, measured_state_bytes
from muon_dist.options import MomentumState, Options
from tests.ranks import run_ranks

# Uneven rows, fewer rows than ranks, one row, tall, wide, square, twice the same; and AdamW's: an embedding, vectors.
SHAPES: dict[str, tuple[int, ...]] = {
    "a.weight": (64, 64),
    "b.weight": (33, 70),
    "c.weight": (3, 40),
    "d.weight": (1, 9),
    "e.weight": (130, 48),
    "f.weight": (64, 64),
    "g.weight": (7, 256),
    "embed_tokens.weight": (50, 12),
    "norm.weight": (5,),
    "scale": (),
}
# Column cuts must be even for FSDP2, so its own set.
EVEN_SHAPES = {name: tuple(4 * n for n in shape) for name, shape in SHAPES.items()}
STEPS = 4

Layout = Callable[[Tensor], Tensor]


def fsdp(ranks: int, dim: int = 0) -> Layout:
    mesh = init_device_mesh("cpu", (ranks,))
    return lambda t: distribute_tensor(t, mesh, [Shard(min(dim, t.ndim - 1)) if t.ndim else Replicate()])


def hsdp() -> Layout:
    mesh = init_device_mesh("cpu", (2, 2))
    return lambda t: distribute_tensor(t, mesh, [Replicate(), Shard(0) if t.ndim else Replicate()])


def cut_both_ways() -> Layout:
    """Replicas of what is cut in both dimensions: no dimension is left to share the momentum out over."""
    mesh = init_device_mesh("cpu", (2, 2, 2))

    def place(t: Tensor) -> Tensor:
        return distribute_tensor(t, mesh, [Replicate(), *(Shard(d) if d < t.ndim else Replicate() for d in (0, 1))])

    return place


def replicated() -> Layout:
    return lambda t: t.clone()


LAYOUTS: dict[str, tuple[int, Callable[[], Layout]]] = {
    "fsdp x2": (2, lambda: fsdp(2)),
    "fsdp x3": (3, lambda: fsdp(3)),
    "fsdp x4": (4, lambda: fsdp(4)),
    "columns x4": (4, lambda: fsdp(4, dim=1)),
    "hsdp 2x2": (4, hsdp),
    "hsdp, columns too 2x2x2": (8, cut_both_ways),
    "ddp x2": (2, replicated),
    "ddp x3": (3, replicated),
}


def values(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def train(
    layout: Layout, shapes: dict[str, tuple[int, ...]], **options: Any
) -> tuple[dict[str, torch.nn.Parameter], DistMuon]:
    """Weights after some steps on fixed gradients. ``b.weight`` has none in the second step."""
    parameters = {name: torch.nn.Parameter(layout(value)) for name, value in values(shapes, 0).items()}
    optimizer = DistMuon(list(parameters.items()), chunk_bytes=40_000, **options)
    for step in range(STEPS):
        for name, gradient in values(shapes, 1 + step).items():
            parameters[name].grad = None if (name, step) == ("b.weight", 1) else layout(gradient)
        optimizer.step()
    return parameters, optimizer


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


# All combinations of states that the layouts are compared in.
STATES: dict[str, dict[str, Any]] = {
    "fp32": {"momentum_state": "fp32"},
    "linear8": {"momentum_state": "linear8", "adamw_state": "dynamic8"},
    "dynamic8": {"momentum_state": "dynamic8"},
}


@pytest.fixture(scope="module")
def references() -> dict[Any, dict[str, Tensor]]:
    """Weights of a single process, for each state and set of shapes."""

    def weights(state: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        parameters, _ = train(replicated(), shapes, wire="fp32", **STATES[state])
        return {name: whole(p) for name, p in parameters.items()}

    return {
        (state, even): weights(state, EVEN_SHAPES if even else SHAPES) for state in STATES for even in (False, True)
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_gives_the_weights_of_a_single_process(name: str, references: dict[Any, dict[str, Tensor]]) -> None:
    ranks, make_layout = LAYOUTS[name]
    even = "columns" in name
    # Columns cut inside a block give other blocks, so other codes: there only fp32 is the same bits.
    states = ["fp32"] if even or name.startswith("hsdp") else list(STATES)

    def check(rank: int) -> None:
        layout = make_layout()
        for state in states:
            parameters, _ = train(layout, EVEN_SHAPES if even else SHAPES, wire="fp32", **STATES[state])
            for key, p in parameters.items():
                assert torch.equal(whole(p), references[state, even][key]), (state, key)

    run_ranks(ranks, check)


@pytest.mark.parametrize("name", ["hsdp 2x2", "ddp x3"])
@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_replicas_end_bit_identical(name: str, wire: str) -> None:
    ranks, make_layout = LAYOUTS[name]

    def weights(rank: int) -> dict[str, Tensor]:
        parameters, _ = train(make_layout(), SHAPES, momentum_state="linear8", wire=wire)
        return {key: p.to_local().detach() if isinstance(p, DTensor) else p.detach() for key, p in parameters.items()}

    results = run_ranks(ranks, weights)
    for rank, theirs in enumerate(results):
        replica = results[rank % 2] if name.startswith("hsdp") else results[0]
        for key, value in theirs.items():
            assert torch.equal(value, replica[key]), (rank, key)


@pytest.mark.parametrize(("wire", "tolerance"), [("bf16", 0.006), ("int8", 0.02)])
def test_a_narrow_wire_costs_its_rounding_and_no_more(
    wire: str, tolerance: float, references: dict[Any, dict[str, Tensor]]
) -> None:
    start = values(SHAPES, 0)

    def errors(rank: int) -> dict[str, float]:
        parameters, _ = train(fsdp(2), SHAPES, momentum_state="fp32", wire=wire)
        result = {}
        for key, p in parameters.items():
            exact = references["fp32", False][key]
            result[key] = float((whole(p) - exact).norm() / (exact - start[key]).norm())
        return result

    for key, error in run_ranks(2, errors)[0].items():
        assert error < tolerance, (key, error)


def test_every_matrix_is_orthogonalised_once_in_the_job() -> None:
    def owned(rank: int) -> list[tuple[str, ...]]:
        _, optimizer = train(hsdp(), SHAPES)
        (plan,) = optimizer.plans
        return [tuple(m.name for m, owner in zip(plan.matrices, plan.owners, strict=True) if owner == rank)]

    found = [name for (names,) in run_ranks(4, owned) for name in names]
    assert sorted(found) == sorted(name for name, shape in SHAPES.items() if len(shape) == 2 and "embed" not in name)


@pytest.mark.parametrize(("state", "most"), [("linear8", 1.02), ("lowrank4", 0.65), ("grasp4", 0.68), ("nf4", 0.52)])
def test_momentum_is_shared_out_over_all_ranks_of_the_job(state: MomentumState, most: float) -> None:
    shapes = {"a.weight": (256, 512), "b.weight": (512, 256), "embed_tokens.weight": (512, 64), "norm.weight": (64,)}
    codec = Options(momentum_state=state, adamw_state="dynamic8")

    def measured(layout: Callable[[], Layout]) -> Callable[[int], Any]:
        def run(rank: int) -> tuple[int, int, list[Any]]:
            _, optimizer = train(layout(), shapes, momentum_state=state, adamw_state="dynamic8")
            return measured_state_bytes(optimizer), measure_muon(optimizer), list(optimizer.grouping())

        return run

    def measure_muon(optimizer: DistMuon) -> int:
        stored = [t for s in optimizer.state.values() for key, t in s.items() if key.startswith("momentum_buffer")]
        return sum(t.to_local().nbytes for t in stored)

    matrix_elements = 2 * 256 * 512
    for ranks, make, shards, replicas in [(4, lambda: fsdp(4), 4, 1), (4, hsdp, 2, 2), (2, replicated, 1, 2)]:
        for total, muon, grouping in run_ranks(ranks, measured(make)):
            assert total == estimated_state_bytes(grouping, shards=shards, replicas=replicas, options=codec)
            assert muon <= most * matrix_elements / ranks


def test_ranks_with_empty_shards_count_steps_like_the_others() -> None:
    def steps(rank: int) -> float:
        parameters, optimizer = train(fsdp(3), {"norm.weight": (2,), "a.weight": (4, 4)})
        return float(optimizer.state[parameters["norm.weight"]]["step"])

    assert run_ranks(3, steps) == [STEPS] * 3


def ranks_with_gradients(rank: int) -> Iterator[str]:
    """All ranks have one of the scalar, of which each holds a replica."""
    yield from (name for i, name in enumerate(SHAPES) if i % dist.get_world_size() != rank or name == "scale")


def test_gradients_missing_on_some_ranks_hang_nothing() -> None:
    def check(rank: int) -> None:
        layout = fsdp(3)
        parameters = {name: torch.nn.Parameter(layout(value)) for name, value in values(SHAPES, 0).items()}
        parameters["a.weight"].requires_grad_(False)
        optimizer = DistMuon(list(parameters.items()))
        before = whole(parameters["a.weight"]).clone()
        present = set(ranks_with_gradients(rank))
        for step in range(2):
            for name, gradient in values(SHAPES, step).items():
                sharded = layout(gradient)
                if name in present and parameters[name].requires_grad:
                    parameters[name].grad = sharded
            optimizer.step()
        assert torch.equal(whole(parameters["a.weight"]), before)
        assert all(torch.isfinite(whole(p)).all() for p in parameters.values())

    run_ranks(3, check)
