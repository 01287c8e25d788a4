"""The table of polar="doubling", and benchmarks/coefficients.py, which finds it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from muon_dist.polar import polar_factor, schedule

SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "coefficients.py"))
STEPS = schedule("doubling")
TABLE = [torch.tensor(doubling, dtype=torch.float64) for doubling in STEPS.doublings]
# Each polynomial is for singular values from this to one.
SMALLEST = (1.22e-3, 0.0573)


def test_the_doubling_table_maps_to_what_its_comment_says_and_fits_fp16() -> None:
    singular = image = SCRIPT["singular_values"](SMALLEST[0], 4000)
    ends = []
    for polynomial in TABLE:
        *squares, _ = SCRIPT["squares"](polynomial, image)
        assert all(float(a.abs().max()) < 1 + 1e-6 for a in squares)
        image = SCRIPT["evaluate"](polynomial, image)
        ends += [float(image.min()), float(image.max())]
    assert ends == pytest.approx([0.0573, 0.94, 0.8448, 1.0952], abs=1e-4)
    matrices = singular[:, None, None]  # of one element
    package = polar_factor(matrices, STEPS, dtype=torch.float64, bound=1 / STEPS.margin)
    assert torch.allclose(package.flatten(), image, rtol=1e-9)


@pytest.mark.parametrize("i", range(len(TABLE)))
def test_no_coefficients_near_the_doubling_table_are_better(i: int) -> None:
    free = SCRIPT["free_coefficients"](len(TABLE[i]), is_first=i == 0)
    assert torch.equal(TABLE[i] != 0, free)
    found = SCRIPT["polish"](TABLE[i], free, SMALLEST[i])
    before, after = (SCRIPT["ratios"](polynomial, SMALLEST[i]) for polynomial in (TABLE[i], found))
    assert 1 - 1e-6 < float(after / before) < 1.002


def test_with_one_product_the_search_finds_polar_express() -> None:
    """Its first triple is the best of degree 5 for [0.024, 1], where the paper's listing starts from ("cushion")."""
    smallest = 0.02407327424182761
    free = SCRIPT["free_coefficients"](1, is_first=True)
    starts = SCRIPT["search"](free, smallest, seed=0, starts=16, iterations=200)
    ((a, b, _, c),) = SCRIPT["polish"](starts[0], free, smallest).tolist()
    steps = schedule("polar_express")
    safe_a, safe_b, safe_c = steps.iterations[0]
    assert [b / a, c / a] == pytest.approx(
        [safe_b / safe_a * steps.margin**2, safe_c / safe_a * steps.margin**4], rel=1e-4
    )
