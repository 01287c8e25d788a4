"""Chains of symmetric products in one launch, against plain products in fp32. They run on Hopper only."""

from __future__ import annotations

import pytest
import torch

from muon_dist import kernels
from muon_dist.polar import schedule
from muon_dist.polar.chains import doubling, doubling_twice, iterations
from muon_dist.polar.products import multiply_chain

if not (kernels.HAS_TRITON and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)

from muon_dist.kernels import chain as chain_kernels

ITERATIONS = iterations(schedule("polar_express", 3).iterations)
DOUBLINGS = schedule("doubling").doublings
CHAINS = [ITERATIONS, *map(doubling, DOUBLINGS), doubling_twice(*DOUBLINGS)]


@pytest.mark.parametrize(
    ("n", "s", "k"),
    [
        (1, 512, 512),
        (5, 640, 1024),  # an odd number of rows of tiles
        (2, 1152, 1216),  # more than one group of rows
        (9, 1024, 4096),
        (3, 2048, 2048),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_tall", [False, True])
@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_equals_its_products(
    n: int, s: int, k: int, dtype: torch.dtype, is_tall: bool, chain: kernels.Chain
) -> None:
    torch.manual_seed(0)
    x = torch.randn(n, k, s, device="cuda").div_((s * k) ** 0.5).to(dtype)
    x = x.mT if is_tall else x.view(n, s, k)
    assert chain_kernels.fits(x)
    for factors in (None, 0.5 + 0.5 * torch.rand(n, device="cuda")):
        squares = x.new_full((chain.slots, n, s, s), float("nan"))
        chain_kernels.multiply_chain(x, chain, squares, factors)
        found, expected = squares[chain.result], multiply_chain(x.float(), chain, factors)
        # A square doubles relative errors: five of them make more of what is rounded than three iterations do.
        rounding = 2e-3 if dtype == torch.float16 else 2e-2
        tolerance = (rounding if chain is ITERATIONS else 4 * rounding) * float(expected.norm())
        assert float((found.float() - expected).norm()) < tolerance


@pytest.mark.parametrize("is_tall", [False, True])
def test_rows_are_scaled_for_their_diagonal_elements(is_tall: bool) -> None:
    torch.manual_seed(0)
    chain = doubling_twice(*DOUBLINGS)
    tall = torch.randn(2, 4096, 1024, device="cuda").div_(2048).half()
    x = tall.mT if is_tall else tall.mT.contiguous()
    squares = x.new_empty(chain.slots, 2, 1024, 1024)
    chain_kernels.multiply_chain(x, chain, squares)
    last = chain.products[-1]
    found, a, b = (squares[slot].double() for slot in (last.out, last.a, last.b))
    exact = last.alpha * a @ b.mT
    diagonal, exact_diagonal = found.diagonal(dim1=1, dim2=2), exact.diagonal(dim1=1, dim2=2)
    of_diagonal = diagonal / exact_diagonal
    of_others = ((found * exact).sum(-1) - diagonal * exact_diagonal) / (exact.square().sum(-1) - exact_diagonal**2)
    assert float((of_diagonal - 1).abs().max()) > 2**-13  # half of the last digit is between 2^-12 and 2^-11
    assert float((of_others - of_diagonal).abs().max()) < 2**-14


def test_chains_of_two_streams_share_the_chip() -> None:
    """Each has as many programs as multiprocessors and waits for its own tiles: neither may starve the other."""
    torch.manual_seed(0)
    chain = ITERATIONS
    xs = [torch.randn(4, 1024, 2048, device="cuda").div_(1448).half() for _ in range(2)]
    expected = [multiply_chain(x, chain).clone() for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    for _ in range(20):
        found = []
        for x, stream in zip(xs, streams, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found.append(multiply_chain(x, chain))
        torch.cuda.synchronize()
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
