"""The polar factor against torch's SVD, in both forms, for every table."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from muon_dist.options import Polar, PolarForm
from muon_dist.polar import Schedule, polar_factor, schedule
from muon_dist.polar.chains import doubling_twice
from muon_dist.polar.products import multiply_chain, times

FORMS: list[PolarForm] = ["standard", "gram"]
TABLES = get_args(Polar)
QUINTIC = [table for table in TABLES if table != "doubling"]
TABLES_AND_FORMS = [("doubling", "auto"), *((table, form) for table in QUINTIC for form in FORMS)]


def exact(matrix: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ v


def with_spectrum(rows: int, cols: int, power: float) -> Tensor:
    """A random matrix whose k-th singular value is k^-power."""
    torch.manual_seed(rows + cols)
    u, _, v = torch.linalg.svd(torch.randn(rows, cols), full_matrices=False)
    return u * torch.arange(1, min(rows, cols) + 1).float() ** -power @ v


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b).sum() / a.double().norm() / b.norm())


@pytest.mark.parametrize(("table", "form"), TABLES_AND_FORMS)
@pytest.mark.parametrize("shape", [(64, 64), (48, 200), (200, 48)])
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_near_the_exact_polar_factor(table: Polar, form: PolarForm, shape: tuple[int, int], power: float) -> None:
    matrix = with_spectrum(*shape, power)
    factor = polar_factor(matrix, schedule(table), form=form)
    assert cosine(factor, exact(matrix)) > (0.98 if table == "jordan" else 0.995)
    singular_values = torch.linalg.svdvals(factor.double())
    assert singular_values.min() > 0.5
    assert singular_values.max() < 1.25


@given(rows=st.integers(1, 40), cols=st.integers(1, 40), seed=st.integers(0, 100), table=st.sampled_from(QUINTIC))
@settings(max_examples=60, deadline=None)
def test_both_forms_are_the_same_map(rows: int, cols: int, seed: int, table: Polar) -> None:
    matrix = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    standard, gram = (polar_factor(matrix, schedule(table, 5), form=form) for form in FORMS)
    assert torch.allclose(standard, gram, atol=2e-3)


def test_doubling_brings_singular_values_nearer_to_each_other_than_five_quintic_steps() -> None:
    """And multiplies the smallest, and what is mixed into them, by less. The quintic steps have the safety factor for
    half precision that gram-newton-schulz takes, 1.05, as the first has such room too."""
    singular = torch.logspace(math.log10(1.22e-3), 0, 2000, dtype=torch.float64)
    polar_express = schedule("polar_express")
    more = 1.05 / polar_express.margin
    safe = Schedule(tuple((a / more, b / more**3, c / more**5) for a, b, c in polar_express.iterations))
    ends = []
    for steps in (schedule("doubling"), safe):
        matrices = singular[:, None, None]  # of one element
        found = polar_factor(matrices, steps, dtype=torch.float64, bound=1 / steps.margin)
        tiny = polar_factor(torch.full((1, 1), 1e-9, dtype=torch.float64), steps, dtype=torch.float64, bound=1.0)
        ends.append((float(found.min()), float(found.max()), float(tiny) / 1e-9))
    (low, high, slope), (safe_low, safe_high, safe_slope) = ends
    assert [low, high, slope] == pytest.approx([0.8448, 1.0952, 799.5], rel=1e-3)
    assert low / high > safe_low / safe_high
    assert slope < safe_slope


@pytest.mark.parametrize(("shape", "power"), [((40, 120), 0.5), ((120, 40), 1.0), ((64, 64), 1.0)])
def test_two_doublings_from_one_gram_matrix_are_the_same_map(shape: tuple[int, int], power: float) -> None:
    steps = schedule("doubling")
    matrix = with_spectrum(*shape, power)[None]
    matrix = matrix / matrix.norm()
    apart = polar_factor(matrix, steps, bound=1 / steps.margin)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 0.05)):
        narrow = matrix.to(dtype)
        wide = narrow if shape[0] <= shape[1] else narrow.mT
        joined = times(multiply_chain(wide, doubling_twice(*steps.doublings)), wide)
        joined = (joined if shape[0] <= shape[1] else joined.mT).float()
        assert float((joined - apart).norm()) < tolerance * float(apart.norm())


@given(side=st.integers(1, 70), spikes=st.integers(1, 2), power=st.floats(-4, -1), seed=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_in_fp16_doubling_is_safe_where_small_singular_values_are_lost(
    side: int, spikes: int, power: float, seed: int
) -> None:
    """What rounding makes of small eigenvalues beside large ones must not grow, though the polynomials are steep."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(side, side, generator=generator))[0] for _ in range(2))
    values = torch.full((side,), 10**power)
    values[:spikes] = 1
    found = polar_factor(u * values @ v.mT, schedule("doubling"), dtype=torch.float16)
    assert float(torch.linalg.svdvals(found.float())[0]) < 1.15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_costs_a_few_per_cent_at_most(dtype: torch.dtype, form: PolarForm) -> None:
    matrix = with_spectrum(48, 160, 1.0)
    wide = polar_factor(matrix, schedule("polar_express", 5))
    narrow = polar_factor(matrix, schedule("polar_express", 5), form=form, dtype=dtype).float()
    # bf16 in the Gram form keeps too few digits of the small singular values: that is why fp16 is the default.
    assert float((narrow - wide).norm() / wide.norm()) < (0.01 if dtype == torch.float16 else 0.15)


@pytest.mark.parametrize(("table", "form"), TABLES_AND_FORMS[:3])
@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1.0, 1e10])
def test_the_size_of_the_matrix_does_not_matter(table: Polar, form: PolarForm, scale: float) -> None:
    matrix = with_spectrum(16, 40, 0.5)
    one, other = (polar_factor(m, schedule(table), form=form) for m in (matrix, matrix * scale))
    assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(("table", "form"), TABLES_AND_FORMS[:3])
def test_zero_matrices_give_zero_also_among_others(table: Polar, form: PolarForm) -> None:
    batch = torch.stack([torch.zeros(8, 20), torch.randn(8, 20)])
    factors = polar_factor(batch, schedule(table), form=form)
    assert torch.equal(factors[0], torch.zeros(8, 20))
    assert torch.equal(factors[1], polar_factor(batch[1], schedule(table), form=form))


def test_the_input_is_left_alone() -> None:
    matrix = torch.randn(8, 8)
    before = matrix.clone()
    polar_factor(matrix, schedule("jordan", 1))
    assert torch.equal(matrix, before)


def test_steps_beyond_a_table_are_refused_where_it_ends() -> None:
    assert len(schedule("polar_express", 12).iterations) == 12
    assert len(schedule("jordan", 12).iterations) == 12
    with pytest.raises(ValueError, match=r"polar_steps=6.*'cans' has 5"):
        schedule("cans", 6)
    with pytest.raises(ValueError, match=r"polar_steps=3.*'doubling' has 2"):
        schedule("doubling", 3)


@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("rank", [1, 24, 48])
def test_many_iterations_leave_what_is_missing_alone(form: PolarForm, rank: int) -> None:
    """In fp16 rounding makes small eigenvalues of either sign of those that are zero; they must not grow."""
    torch.manual_seed(0)
    deficient = torch.randn(96, rank) / torch.arange(1, rank + 1) @ torch.randn(rank, 48)
    found = polar_factor(deficient, schedule("polar_express", 8), form=form, dtype=torch.float16).float()
    singular = torch.linalg.svdvals(found)
    assert ((singular - 1).abs() < 0.02)[:rank].sum() >= min(rank, 24)
    assert float(singular.max()) < 1.02
    assert float(singular[rank:].norm()) < 0.5 * rank**0.5 + 1
