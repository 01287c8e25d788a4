"""The symmetric product against its reference: compiled on CUDA, in Triton's interpreter elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from muon_dist import kernels
from muon_dist.polar.products import SMALLEST_NORM, normalised, symmetric_product
from tests.kernels.test_kernels import DEVICE

if not kernels.HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton

if DEVICE == "cpu" and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
    pytest.skip("older interpreters do not take tensor descriptors (seen with 3.5)", allow_module_level=True)

from muon_dist.kernels import normalise as normalise_kernels
from muon_dist.kernels import symmetric as symmetric_kernels


def require_product(x: Tensor, add: Tensor | None, tolerance: float) -> None:
    factors = (0.5, 0.0 if add is None else -2.0, 3.0)
    expected, found = (
        torch.empty(x.shape[0], *[x.shape[1]] * 2, device=DEVICE, dtype=t) for t in (torch.float32, x.dtype)
    )
    symmetric_product(x.float(), x.float(), None if add is None else add.float(), *factors, expected)
    symmetric_kernels.symmetric_product(x, x, add, *factors, found)
    assert float((found.float() - expected).norm() / expected.norm()) < tolerance
    if add is not None:
        symmetric_kernels.symmetric_product(x, x, add, *factors, add)
        assert torch.equal(add, found)


@pytest.mark.parametrize(("n", "s", "k"), [(1, 128, 64), (2, 200, 104), (1, 392, 136)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gram_matrix(n: int, s: int, k: int, dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter does not multiply bf16 that came through a descriptor")
    torch.manual_seed(0)
    require_product(torch.randn(n, s, k, device=DEVICE).to(dtype), None, 8e-3)


def test_gram_matrix_of_a_tall_matrix_as_it_lies() -> None:
    torch.manual_seed(0)
    require_product(torch.randn(2, 136, 200, device=DEVICE).half().mT, None, 2e-3)


@pytest.mark.parametrize("size", [1e-35, 1e-25, 1.0, 1e25])
def test_division_by_the_norm_also_in_place(size: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 170, 90, device=DEVICE) * size
    x[1] = 0
    expected = torch.empty(x.shape)
    normalised(x.cpu(), 1.1, out=expected)
    found = torch.empty_like(x)
    normalise_kernels.normalise(x, found, 1.1, SMALLEST_NORM)
    assert torch.allclose(found.cpu(), expected, rtol=1e-5)
    rest = normalise_kernels.normalise(x, found, 1.1, SMALLEST_NORM, exactly=True)
    exact_rest = normalised(x.cpu(), 1.1, out=expected, exactly=True)
    assert rest is not None
    assert exact_rest is not None
    assert torch.equal(found.cpu(), expected)
    assert torch.allclose(rest.cpu(), exact_rest, rtol=1e-5)
    normalise_kernels.normalise(x, found, 1.1, SMALLEST_NORM)
    normalise_kernels.normalise(x, x, 1.1, SMALLEST_NORM)
    assert torch.equal(x, found)


def test_a_polynomial_of_a_symmetric_matrix() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 264, 264, device=DEVICE) / 16
    gram = (x @ x.mT).half()
    require_product(gram, gram.clone(), 2e-3)
