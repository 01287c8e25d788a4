"""Finds the coefficients of polar="doubling": two odd polynomials, made of squares, that take singular values near one.

    python benchmarks/coefficients.py [--from 1.22e-3] [--products 5 4] [--top 0.94] [--centre 0.97] [--seeds 5]

On CPU; needs scipy. Each polynomial maps an interval that ends at 1 to the narrowest one: whose ends have the largest
ratio. The first has [--from, 1], and is scaled to end at --top. The second has what the first leaves, up to 1, and is
scaled to an image symmetric about --centre. The first adds the identity in its last product only, for the sake of
fp16; the second adds identity and Gram matrix, and not the last square.

There are fewer coefficients than degrees, and many local optima. A seed is a batch of random starts that Adam takes
uphill; sequential quadratic programming (scipy's SLSQP) finishes the best few. Printed are the ratios they reach, the
table as muon_dist/polar/coefficients.py has it, the images, the slope at zero, by which the smallest singular values
grow, and the same of the table in use.

A_i may have any factor that the next product takes back. The one it gets makes it 1 in magnitude where it is largest,
so that fp16 has room, and negative at the smallest singular value.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from muon_dist.polar import schedule

STARTS, ITERATIONS, FINISHED = 96, 1000, 4  # of a seed: polynomials, Adam's steps, and how many SLSQP takes
FEW, MANY = 600, 40_000  # singular values that stand for an interval
EXCHANGES = 3


def free_coefficients(products: int, is_first: bool) -> Tensor:
    """Which of (a, b, c, d) of each product are not zero, ``[products, 4]``."""
    free = torch.ones(products, 4, dtype=torch.bool)
    if is_first:
        free[:-1, 0] = False
        free[0, 2] = False  # A_0 is R, which has its own
    else:
        free[:, 2] = False
    return free


def squares(polynomial: Tensor, s: Tensor) -> Iterator[Tensor]:
    """Each A_i of a Doubling ``[..., products, 4]`` at singular values ``[n]``; the last is q(s^2). ``[..., n]``."""
    last = gram = s * s
    for product in polynomial.unbind(-2):
        a, b, c, d = product.unsqueeze(-1).unbind(-2)
        last = a + b * gram + c * last + d * last * last
        yield last


def evaluate(polynomial: Tensor, s: Tensor) -> Tensor:
    """s q(s^2), ``[..., n]``."""
    *_, q = squares(polynomial, s)
    return s * q


def singular_values(smallest: float, n: int) -> Tensor:
    """From the smallest to one: half of them even in their logarithms, half denser towards one, as extrema lie."""
    even = torch.logspace(math.log10(smallest), 0, n // 2, dtype=torch.float64)
    dense = smallest + (1 - smallest) * torch.linspace(0, math.pi / 2, n // 2, dtype=torch.float64).sin()
    return torch.cat([even, dense]).clamp(smallest, 1).unique()


def ratios(polynomial: Tensor, smallest: float) -> Tensor:
    """The lower end of the image of [smallest, 1] over the upper one, ``[...]``; -1 at worst, if it has both signs."""
    f = evaluate(polynomial, singular_values(smallest, MANY))
    return (f.amin(-1) / f.abs().amax(-1)).nan_to_num(-1)


def search(free: Tensor, smallest: float, seed: int, starts: int = STARTS, iterations: int = ITERATIONS) -> Tensor:
    """Polynomials of large ratio by Adam from random starts, ``[starts, products, 4]``, the best first.

    What it sees of the extremes are logarithms of sums of powers, which rise as it goes. Where values of both signs are
    to be told apart asinh stands in for the logarithm.
    """
    generator = torch.Generator().manual_seed(seed)
    s = torch.logspace(math.log10(smallest), 0, 250, dtype=torch.float64)
    sizes = torch.exp(3 * torch.rand(starts, 1, 1, generator=generator, dtype=torch.float64) - 1)
    found = torch.randn(starts, *free.shape, generator=generator, dtype=torch.float64) * sizes * free
    found.requires_grad_()
    adam = torch.optim.Adam([found])
    for iteration in range(iterations):
        progress = iteration / iterations
        sharpness = 4 * 10**progress
        adam.param_groups[0]["lr"] = 0.05 * 0.01 ** (max(0.0, progress - 0.3) / 0.7)
        f = evaluate(found * free, s)
        largest = (sharpness * (f.abs() + 1e-30).log()).logsumexp(-1, keepdim=True).div(sharpness).exp()
        loss = (-sharpness * (f / largest / 1e-5).asinh()).logsumexp(-1) / sharpness
        (gradient,) = torch.autograd.grad(loss.sum(), found)
        gradient.nan_to_num_(0.0, 0.0, 0.0)
        found.grad = gradient / gradient.norm(dim=(-2, -1), keepdim=True).clamp(min=1)
        adam.step()
    found = (found * free).detach()
    found[:, -1] /= evaluate(found, s).abs().amax(-1)[:, None]
    return found[ratios(found, smallest).argsort(descending=True)]


def polish(polynomial: Tensor, free: Tensor, smallest: float) -> Tensor:
    """The local optimum beside a polynomial whose maximum is about 1, ``[products, 4]``.

    Few singular values stand for the interval at first; the extrema between them join them, as in Remez's exchange.
    """
    s, everywhere = singular_values(smallest, FEW), singular_values(smallest, MANY)
    for _ in range(EXCHANGES):
        polynomial = polish_at(s, polynomial, free)
        rising = evaluate(polynomial, everywhere).diff() > 0
        s = torch.cat([s, everywhere[1:-1][rising[1:] != rising[:-1]]]).unique()
    return polynomial


def polish_at(s: Tensor, polynomial: Tensor, free: Tensor) -> Tensor:
    """The largest t with t <= f <= 1 at these singular values. Unknown are the free coefficients and log t."""
    from scipy.optimize import minimize

    def of(unknown: np.ndarray) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy(unknown)
        return torch.zeros_like(polynomial).masked_scatter(free, x[:-1]), x[-1].exp()

    def margins(unknown: np.ndarray) -> Tensor:
        coefficients, t = of(unknown)
        f = evaluate(coefficients, s)
        return torch.cat([f / t - 1, 1 - f])

    def slopes(unknown: np.ndarray) -> Tensor:
        coefficients, t = of(unknown)
        each = coefficients.repeat(len(s), 1, 1).requires_grad_()  # of each singular value, for a row of the Jacobian
        f = evaluate(each, s[:, None])
        (rows,) = torch.autograd.grad(f.sum(), each)
        rows = rows[:, free]
        return torch.cat([torch.cat([rows / t, -f.detach() / t], 1), torch.cat([-rows, torch.zeros_like(f)], 1)])

    lowest = evaluate(polynomial, s).min().clamp(min=1e-9)
    start = torch.cat([polynomial[free], lowest.log()[None]]).numpy()
    downhill = [0.0] * (len(start) - 1) + [-1.0]
    found = minimize(
        lambda unknown: -unknown[-1],
        start,
        method="SLSQP",
        jac=lambda unknown: downhill,
        constraints={"type": "ineq", "fun": margins, "jac": slopes},
        options={"maxiter": 200, "ftol": 1e-10},
    )
    return of(found.x)[0]


def find(free: Tensor, smallest: float, seeds: int) -> Tensor:
    """The polynomial of the largest ratio that several seeds lead to, ``[products, 4]``."""
    best = []
    for seed in range(seeds):
        finished = torch.stack([polish(start, free, smallest) for start in search(free, smallest, seed)[:FINISHED]])
        found = ratios(finished, smallest)
        best.append(finished[found.argmax()])
        print(f"    seed {seed}: {'  '.join(f'{r:.6f}' if r > 0 else 'diverged' for r in found.tolist())}", flush=True)
    together = torch.stack(best)
    return together[ratios(together, smallest).argmax()]


def scaled(polynomial: Tensor, smallest: float, top: float) -> Tensor:
    """The same polynomial up to ``top``, each A_i but the last as large as 1 and negative at first."""
    s = singular_values(smallest, MANY)
    every = list(squares(polynomial, s))
    sizes = [-a.abs().max() * a[0].sign() for a in every[:-1]]
    sizes.append((s * every[-1]).max() / top)
    rows, before = [], 1.0
    for product, size in zip(polynomial, sizes, strict=True):
        rows.append(product * polynomial.new_tensor([1.0, 1.0, before, before**2]) / size)
        before = float(size)
    return torch.stack(rows)


def as_table(polynomials: list[Tensor]) -> Iterator[str]:
    yield "_DOUBLING: tuple[Doubling, ...] = ("
    for polynomial in polynomials:
        yield "    ("
        for product in polynomial.tolist():
            yield f"        ({', '.join(f'{number:.9g}' if number else '0.0' for number in product)}),"
        yield "    ),"
    yield ")"


def figures(polynomials: list[Tensor], smallest: float) -> str:
    first, second = polynomials
    between = evaluate(first, singular_values(smallest, MANY))
    after = evaluate(second, between)
    tiny = between.new_tensor([1e-12])
    slope = float(evaluate(second, evaluate(first, tiny)) / tiny)
    images = " -> ".join(f"[{image.min():.5f}, {image.max():.5f}]" for image in (between, after))
    return f"[{smallest:g}, 1] -> {images}, slope at zero {slope:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", type=float, default=1.22e-3, dest="smallest", help="smallest singular value")
    parser.add_argument("--products", type=int, nargs=2, default=(5, 4), metavar=("FIRST", "SECOND"))
    parser.add_argument("--top", type=float, default=0.94, help="where the first polynomial ends")
    parser.add_argument("--centre", type=float, default=0.97, help="of what the second one ends at")
    parser.add_argument("--seeds", type=int, default=5, help=f"batches of {STARTS} starts for each polynomial")
    arguments = parser.parse_args()
    found: list[Tensor] = []
    smallest, begin = arguments.smallest, time.perf_counter()
    for i, products in enumerate(arguments.products):
        print(f"polynomial {i + 1}, {products} products: ratios of the images of [{smallest:.6g}, 1]")
        free = free_coefficients(products, is_first=i == 0)
        polynomial = find(free, smallest, arguments.seeds)
        ratio = float(ratios(polynomial, smallest))
        if ratio <= 0:
            parser.error(f"--seeds {arguments.seeds}: no start led to a polynomial without zeros; try more")
        top = arguments.top if i == 0 else 2 * arguments.centre / (1 + ratio)
        found.append(scaled(polynomial, smallest, top))
        smallest = ratio * top
    print(f"in {time.perf_counter() - begin:.0f} s\n\n" + "\n".join(as_table(found)) + "\n")
    in_use = [torch.tensor(table, dtype=torch.float64) for table in schedule("doubling").doublings]
    print(f"found    {figures(found, arguments.smallest)}")
    print(f"in use   {figures(in_use, arguments.smallest)}")


if __name__ == "__main__":
    main()
