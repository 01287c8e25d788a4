"""Chains of symmetric products: what a few Newton-Schulz steps do to the Gram matrices of a batch.

With R = X X^T, an iteration multiplies X by P = a I + b R + c R^2, which makes R into P R P. The P of several
iterations are collected in Q: the iterations together multiply X by Q. P, Q and R are polynomials of the same symmetric
matrix, so they commute and all their products are symmetric.
"""

from __future__ import annotations

from functools import lru_cache

from muon_dist.kernels import Chain, Product
from muon_dist.polar.coefficients import Doubling, Triple


@lru_cache
def iterations(coefficients: tuple[Triple, ...]) -> Chain:
    """The chain that makes Q from X, for iterations with these coefficients (a, b, c)."""
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
    r = last = 0
    products = [Product(None, None, r)]
    for a, b, c in step.products:
        out = _free(last, r) if step.adds_gram else _free(last)
        products.append(Product(last, last, out, add=r if step.adds_gram else last, alpha=c, beta=b, diagonal=a))
        last = out
    return Chain(tuple(products), 1 + max(product.out for product in products), last)


def _polynomial(r: int, p: int, triple: Triple) -> Product:
    a, b, c = triple
    return Product(r, r, p, add=r, alpha=c, beta=b, diagonal=a)


def _free(*used: int) -> int:
    return next(slot for slot in range(4) if slot not in used)
