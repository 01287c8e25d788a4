"""The products that Newton-Schulz is made of: those of Gram matrices, in chains, where half of a symmetric result is
computed; those with whole matrices; and what goes before them, division by the norm."""

from __future__ import annotations

import torch
from torch import Tensor

from muon_dist import kernels

if kernels.HAS_TRITON:
    from muon_dist.kernels import chain as chain_kernels
    from muon_dist.kernels import normalise as normalise_kernels
    from muon_dist.kernels import symmetric as symmetric_kernels

# Matrices whose norm is below this count as zero: so does, about, their polar factor.
SMALLEST_NORM = 1e-30


def multiply_chain(x: Tensor, chain: kernels.Chain, factors: Tensor | None = None) -> Tensor:
    """Runs a chain from X, and returns its result.

    Args:
        x: ``[n, s, l]``, contiguous, or the transpose of a contiguous one.
        factors: fp32 ``[n]``: X is taken times these, and so is the result, for the sake of Q X.

    Returns:
        ``[n, s, s]`` in the dtype of x; it keeps the memory of all slots of the chain alive.
    """
    n, s, _ = x.shape
    squares = x.new_empty((chain.slots, n, s, s))
    if is_one_launch(x):
        chain_kernels.multiply_chain(x, chain, squares, factors)
        return squares[chain.result]
    if factors is not None:
        x = x * factors[:, None, None].to(x.dtype)
        return multiply_chain(x, chain).mul_(factors[:, None, None])
    for product in chain.products:
        a, b = (x if slot is None else squares[slot] for slot in (product.a, product.b))
        if len(product.terms) > 1 or product.rest is not None or not product.is_symmetric:
            _any_product(product, a, b, squares)
            continue
        out, beta = squares[product.out], product.beta
        add = None if product.add is None else squares[product.add]
        if add is not None and product.also is not None:
            torch.mul(add, beta, out=out).add_(squares[product.also], alpha=product.gamma)
            add, beta = out, 1.0
        symmetric_product(a, b, add, product.alpha, beta, product.diagonal, out)
    return squares[chain.result]


def is_one_launch(x: Tensor) -> bool:
    """Whether a chain from ``x`` is, on this device."""
    return kernels.usable_on(x.device) and chain_kernels.fits(x)


def _any_product(product: kernels.Product, a: Tensor, b: Tensor, squares: Tensor) -> None:
    """One of those that are not just symmetric, in fp32."""
    result = a.float() @ b.float().mT
    if product.a_rest is not None:
        result += squares[product.a_rest].float() @ b.float().mT
    result *= product.alpha
    if product.add is not None:
        result += product.beta * squares[product.add].float()
    if product.keeps_diagonal:
        diagonal = result.diagonal(dim1=-2, dim2=-1)
        result *= (diagonal.to(squares.dtype).float() / diagonal).nan_to_num_(1.0).unsqueeze(-1)
    squares[product.out] = result
    if product.rest is not None:
        squares[product.rest] = result - squares[product.out].float()


def symmetric_product(
    a: Tensor, b: Tensor, add: Tensor | None, alpha: float, beta: float, diagonal: float, out: Tensor
) -> None:
    """alpha A B^T + beta D + diagonal I, of a batch, into ``out``.

    Args:
        a, b: ``[n, s, k]`` with a symmetric A B^T: b is a, or both are polynomials of one symmetric matrix.
            Contiguous, or transposes of contiguous ones.
        add: D, ``[n, s, s]``, symmetric; it may be ``out``.
        out: ``[n, s, s]``, contiguous, none of the factors.
    """
    if kernels.usable_on(a.device) and symmetric_kernels.fits(a):
        symmetric_kernels.symmetric_product(a, b, add, alpha, beta, diagonal, out)
        return
    added, beta = (out, 0.0) if add is None else (add, beta)  # times zero, whatever is in out counts for nothing
    torch.baddbmm(added, a, b.mT, beta=beta, alpha=alpha, out=out)
    if diagonal:
        out.diagonal(dim1=-2, dim2=-1).add_(diagonal)


def times(q: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Q X for ``[n, s, s]`` and ``[n, s, l]``; laid out in memory as x is, also ``out``."""
    if x.stride(-1) != 1:
        return torch.bmm(x.mT, q.mT, out=None if out is None else out.mT).mT
    return torch.bmm(q, x, out=out)


def normalised(matrices: Tensor, margin: float, *, out: Tensor, exactly: bool = False) -> Tensor | None:
    """Each matrix divided by ``margin`` times its Frobenius norm, into ``out``; zeros stay zeros.

    Args:
        matrices, out: ``[n, rows, cols]``, contiguous within a matrix. They may be the same memory where their elements
            are as large.
        exactly: divide by powers of two only, so that fp16 has all digits of what was bf16; norms are then between 32
            and 64, where few elements are so small that they lose digits.

    Returns:
        fp32 ``[n]``, by what is still to be multiplied, with ``exactly``.
    """
    if kernels.usable_on(matrices.device):
        return normalise_kernels.normalise(matrices, out, margin, SMALLEST_NORM, exactly)
    # By the largest element first: then squares neither overflow nor vanish.
    largest = torch.linalg.vector_norm(matrices, ord=torch.inf, dim=(-2, -1)).float().clamp_(min=SMALLEST_NORM)
    relative = matrices.to(torch.float32, copy=True).div_(largest[:, None, None])
    norm = torch.linalg.vector_norm(relative, dim=(-2, -1)).mul_(largest).clamp_(min=SMALLEST_NORM)
    norm *= margin
    if exactly:
        _, exponent = torch.frexp(norm)
        powers = torch.ldexp(torch.ones_like(norm), 6 - exponent)
        out.copy_(matrices * powers[:, None, None])
        return 1 / (powers * norm)
    torch.mul(relative, (largest / norm)[:, None, None], out=relative)
    out.copy_(relative)
    return None
