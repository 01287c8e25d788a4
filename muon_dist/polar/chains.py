"""Chains of symmetric products: what a few Newton-Schulz steps do to the Gram matrices of a batch.

With R = X X^T, a polynomial of odd degree multiplies X by a polynomial of R. All of them are polynomials of the same
symmetric matrix, so they commute and their products are symmetric: but for rounding, where it matters below.
"""

from __future__ import annotations

import math
from functools import lru_cache

from muon_dist.kernels import Chain, Product
from muon_dist.polar.coefficients import Doubling, Triple

# Elements of R are at most 1, and most of them small. Where what rounding takes off them is to be kept, they are stored
# as many times as large: fp16 ends at 2^-24 and 2^16.
_LARGE = 2.0**14


@lru_cache
def iterations(coefficients: tuple[Triple, ...]) -> Chain:
    """The chain that makes Q from X, for iterations with these coefficients (a, b, c).

    An iteration multiplies X by P = a I + b R + c R^2, which makes R into P R P. The P of several iterations are
    collected in Q: the iterations together multiply X by Q.
    """
    r, p = 0, 1
    q = p
    products = [Product(None, None, r), _polynomial(r, p, coefficients[0])]
    for triple in coefficients[1:]:
        pr = _free(r, p, q)
        products += [Product(p, r, pr), Product(pr, p, r)]
        p = _free(r, q)
        products.append(_polynomial(r, p, triple))
        collected = _free(r, p, q)
        products.append(Product(q, p, collected))
        q = collected
    return Chain(tuple(products), 1 + max(product.out for product in products), q)


@lru_cache
def doubling(step: Doubling) -> Chain:
    """The chain that makes Q from X, for a polynomial whose products are squares."""
    r, *free = range(3)
    squares = _squares(step, r, free)
    return Chain((Product(None, None, r), *squares), 3, squares[-1].out)


@lru_cache
def doubling_twice(first: Doubling, second: Doubling) -> Chain:
    """The chain that makes Q from X for two such polynomials, P_1 and P_2, without multiplying X between them.

        R_2 = P_1 R P_1,    Q = P_2 P_1

    R_2 has eigenvalues that P_1 made from ones a thousand times smaller: so here R and P_1 R count with what rounding
    took off them. And P_1, as it was rounded, does not quite commute with R and P_2, so these two products are not
    symmetric.

    Of steep spectra P_1 and Q are nearly multiples of I. What rounding takes off their diagonals is then most of what
    it takes, and counts for as much as the largest singular values. P_1 is made as large as to lie just below a power
    of two, where digits are finest; and each row of Q is scaled so that fp16 has its diagonal element exactly: an error
    of a whole row counts for no more than that row of the result, whose singular values are alike.
    """
    r, rest, *free = range(4)
    a, b, c, d = first[-1]
    size = _to_below_a_power_of_two(a)
    squares = _squares((*first[:-1], (size * a, size * b, size * c, size * d)), r, free, _LARGE)
    p = squares[-1].out
    pr, pr_rest = rest, next(slot for slot in free if slot != p)
    again = _squares(second, r, [pr, pr_rest])
    q = next(slot for slot in (pr, pr_rest) if slot != again[-1].out)
    products = (
        Product(None, None, r, alpha=_LARGE, rest=rest),
        *squares,
        Product(p, rest, pr_rest, is_symmetric=False),
        Product(p, r, pr, add=pr_rest, beta=1.0, rest=pr_rest, is_symmetric=False),
        Product(pr, p, r, alpha=1 / (_LARGE * size**2), a_rest=pr_rest),
        *again,
        Product(again[-1].out, p, q, alpha=1 / size, is_symmetric=False, keeps_diagonal=True),
    )
    return Chain(products, 4, q)


def _squares(step: Doubling, r: int, free: list[int], scale: float = 1.0) -> list[Product]:
    """The products of a polynomial of R, which is ``scale`` times as large in its slot; two free ones take turns."""
    products: list[Product] = []
    last, size = r, scale
    for i, (a, b, c, d) in enumerate(step):
        gram = (r, b / scale)
        (add, beta), (also, gamma) = ((last, c), gram) if c else (gram, (None, 0.0))
        out = free[i % 2]
        products.append(Product(last, last, out, add, also, d / size**2, beta, gamma, a))
        last, size = out, 1.0
    return products


def _to_below_a_power_of_two(number: float) -> float:
    """What it is to be multiplied by."""
    mantissa, _ = math.frexp(number)
    return 0.998 / mantissa


def _polynomial(r: int, p: int, triple: Triple) -> Product:
    a, b, c = triple
    return Product(r, r, p, add=r, alpha=c, beta=b, diagonal=a)


def _free(*used: int) -> int:
    return next(slot for slot in range(4) if slot not in used)
