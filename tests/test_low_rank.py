"""Low-rank codecs: they follow the best low-rank part, cost what they say on any layout, and train as fp32 does."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from muon_dist import DistMuon
from muon_dist.codecs import FOUR_BIT_CODECS, LOW_RANK_CODECS, Codec, make_codec, make_low_rank_codec, nbytes
from muon_dist.codecs.lowrank import LowRank
from muon_dist.layout import Extent, chunk_range
from muon_dist.options import LowRankState, MomentumState
from tests.ranks import run_ranks
from tests.test_codecs import stored
from tests.test_sharded import SHAPES, STEPS, Layout, fsdp, hsdp, replicated, train, values, whole

# Most that a matrix of the shapes below may cost: bytes an element, all included.
MOST_BYTES = {"grasp4": 0.68, "lowrank4": 0.65}


def low_rank(name: LowRankState, rows: int, cols: int, **options: Any) -> LowRank:
    """For a matrix in one piece."""
    codec = make_low_rank_codec(name, 128, Extent((rows, cols), (rows, cols)), **options)
    assert isinstance(codec, LowRank)
    return codec


def falling(rows: int, cols: int, seed: int = 0) -> Tensor:
    """A matrix whose singular values are 1 / k."""
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(rows, cols, generator=generator), full_matrices=False)
    return u / torch.arange(1, min(rows, cols) + 1) @ v


def followed(codec: Codec, target: Tensor, steps: int = 8) -> dict[str, Tensor]:
    """Its buffers after some steps on the same matrix: power iteration has settled."""
    buffers = stored(codec, target)
    for _ in range(steps):
        codec.encode(target, buffers)
    return buffers


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", [(256, 256), (512, 128), (128, 512)])
@pytest.mark.parametrize("name", LOW_RANK_CODECS)
def test_the_low_rank_part_is_that_of_the_svd(name: LowRankState, shape: tuple[int, int]) -> None:
    codec, target = low_rank(name, *shape), falling(*shape)
    low = codec.low(followed(codec, target), shape[1])
    left_out = float(torch.linalg.svdvals(target)[codec.rank :].norm() / target.norm())
    # Each factor adds its rounding: 0.6% in 8 bits, 10% in 4.
    rounding = math.sqrt(2) * (0.01 if name == "grasp4" else 0.1)
    assert left_out * 0.999 <= error(low, target) <= 1.02 * math.hypot(left_out, rounding)


def test_the_ranks_are_those_of_the_paper_and_of_the_budget() -> None:
    assert low_rank("grasp4", 1024, 4096).rank == 1024 // 16
    assert low_rank("lowrank4", 1024, 1024).rank == 1024 // 8
    assert low_rank("lowrank4", 1024, 4096, rank_fraction=1 / 16).rank == 1024 // 16


@pytest.mark.parametrize("shape", [(384, 384), (512, 128), (128, 512)])
def test_lowrank4_is_nearer_than_grasp4_and_both_than_plain_codes(shape: tuple[int, int]) -> None:
    target = falling(*shape)
    errors = {}
    for codec in (low_rank("lowrank4", *shape), low_rank("grasp4", *shape), make_codec("int4")):
        errors[codec.name] = error(codec.decode(followed(codec, target), shape[1]), target)
    assert errors["lowrank4"] < 0.85 * errors["grasp4"]
    assert errors["grasp4"] < 0.3 * errors["int4"]


@pytest.mark.parametrize("name", LOW_RANK_CODECS)
@given(rows=st.integers(1, 40), cols=st.integers(1, 40), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_any_shape_is_stored_within_the_error_of_plain_codes(
    name: LowRankState, rows: int, cols: int, seed: int
) -> None:
    """Also where there are fewer rows, or columns, than a rank, and where rows are zero or of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(rows, cols, generator=generator) * torch.logspace(-9, 3, rows).unsqueeze(1)
    target[seed % rows] *= seed % 2
    codec = low_rank(name, rows, cols)
    found = codec.decode(stored(codec, target), cols)
    assert float((found - target).norm()) <= 0.15 * float(target.norm())


@pytest.mark.parametrize("name", LOW_RANK_CODECS)
def test_zeros_stay_zeros_and_nan_stays_visible(name: LowRankState) -> None:
    codec = low_rank(name, 30, 20)
    assert (codec.decode(stored(codec, torch.zeros(30, 20)), 20) == 0).all()
    broken = torch.ones(30, 20)
    broken[7, 3] = float("nan")
    assert codec.decode(stored(codec, broken), 20)[7, 3].isnan()


@pytest.mark.parametrize("name", LOW_RANK_CODECS)
@given(start=st.integers(0, 256 * 200), length=st.integers(1, 256 * 56))
@settings(max_examples=15, deadline=None)
def test_a_run_is_folded_at_the_width_of_its_matrix(name: LowRankState, start: int, length: int) -> None:
    """Also one that starts and ends inside rows: it is stored as well as its rows are."""
    run = falling(256, 256).flatten()[start : start + length].unsqueeze(0)
    rows = math.ceil(length / 256)
    codec = make_low_rank_codec(name, 128, Extent((256, 256), (rows, 256), run=True))
    found = codec.decode(followed(codec, run, steps=3), length)
    assert found.shape == run.shape
    assert error(found, run) < 0.12


@pytest.mark.parametrize("name", LOW_RANK_CODECS)
@given(
    rows=st.sampled_from([768, 1024, 2048, 8192]),
    cols=st.sampled_from([768, 1024, 2048, 8192]),
    parts=st.integers(1, 8),
)
@settings(max_examples=30, deadline=None)
def test_bytes_an_element_do_not_grow_with_the_number_of_ranks(
    name: LowRankState, rows: int, cols: int, parts: int
) -> None:
    height = chunk_range(rows, parts, 0)[1]
    codec = make_low_rank_codec(name, 128, Extent((rows, cols), (height, cols), (parts, 1)))
    assert nbytes(codec, (height, cols)) <= MOST_BYTES[name] * height * cols


LAYOUTS: dict[str, tuple[int, Callable[[], Layout]]] = {
    "fsdp x3": (3, lambda: fsdp(3)),
    "hsdp 2x2": (4, hsdp),
    "ddp x2": (2, replicated),
}
EVEN = {name: tuple(4 * n for n in shape) for name, shape in SHAPES.items()}  # two columns share a byte


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_trains_as_fp32_does(layout: str) -> None:
    """Within what storing the momentum costs: shards have subspaces of their own, and other codes than the whole."""
    ranks, make_layout = LAYOUTS[layout]
    exact, _ = train(replicated(), EVEN, wire="fp32", momentum_state="fp32")
    start = values(EVEN, 0)

    def check(rank: int) -> None:
        for name in LOW_RANK_CODECS:
            parameters, _ = train(make_layout(), EVEN, wire="fp32", momentum_state=name)
            for key, p in parameters.items():
                travelled = float((exact[key] - start[key]).norm())
                assert float((whole(p) - exact[key]).norm()) <= 0.06 * travelled, (name, key)

    run_ranks(ranks, check)


@pytest.mark.parametrize("name", LOW_RANK_CODECS)
def test_a_resumed_run_goes_on_from_its_subspace(name: LowRankState) -> None:
    """The stored factors are where the next power iteration starts: they are part of the state."""

    def steps(p: nn.Parameter, optimizer: DistMuon, which: range) -> None:
        for step in which:
            p.grad = falling(64, 96, seed=step)
            optimizer.step()

    p, q = (nn.Parameter(torch.ones(64, 96)) for _ in range(2))
    optimizer, resumed = (DistMuon([("w", parameter)], momentum_state=name) for parameter in (p, q))
    steps(p, optimizer, range(STEPS))
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        q.copy_(p)
    for parameter, its in ((p, optimizer), (q, resumed)):
        steps(parameter, its, range(STEPS, 2 * STEPS))
    assert torch.equal(p, q)


@pytest.mark.parametrize("name", FOUR_BIT_CODECS)
def test_columns_cut_at_odd_places_are_refused(name: MomentumState) -> None:
    def check(rank: int) -> None:
        with pytest.raises(ValueError, match=rf"w: {name} stores two columns a byte.*every 5"):
            train(fsdp(2, dim=1), {"w": (8, 10)}, momentum_state=name)

    run_ranks(2, check)
