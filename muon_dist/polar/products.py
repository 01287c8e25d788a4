"""The products that Newton-Schulz is made of: with a symmetric result, so that half of it need not be computed; with a
symmetric factor, so that tall matrices need not be transposed; and what goes before them, division by the norm."""

from __future__ import annotations

import torch
from torch import Tensor

from muon_dist import kernels

if kernels.HAS_TRITON:
    from muon_dist.kernels import normalise as normalise_kernels
    from muon_dist.kernels import symmetric as symmetric_kernels

# Matrices whose norm is below this count as zero: so does, about, their polar factor.
SMALLEST_NORM = 1e-30


def symmetric_product(
    a: Tensor, b: Tensor, *, add: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0, diagonal: float = 0.0
) -> Tensor:
    """alpha A B^T + beta D + diagonal I, of a batch.

    Args:
        a, b: ``[n, s, k]`` with a symmetric A B^T: b is a, or both are polynomials of one symmetric matrix.
            Contiguous, or transposes of contiguous ones.
        add: D, ``[n, s, s]``, symmetric.

    Returns:
        ``[n, s, s]``, symmetric to rounding.
    """
    if kernels.usable_on(a.device) and symmetric_kernels.fits(a):
        return symmetric_kernels.symmetric_product(a, b, add, alpha, beta, diagonal)
    product = torch.bmm(a, b.mT) if add is None else torch.baddbmm(add, a, b.mT, beta=beta, alpha=alpha)
    if diagonal:
        product.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return product


def times_symmetric(q: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """Q X for a symmetric Q, ``[n, s, s]``, and ``[n, s, l]``; laid out in memory as x is, also ``out``."""
    if x.stride(-1) != 1:
        return torch.bmm(x.mT, q, out=None if out is None else out.mT).mT
    return torch.bmm(q, x, out=out)


def normalised(matrices: Tensor, margin: float, *, out: Tensor) -> None:
    """Each matrix divided by ``margin`` times its Frobenius norm, into ``out``; zeros stay zeros.

    ``[n, rows, cols]``, contiguous within a matrix; both may be the same memory where their elements are as large.
    """
    if kernels.usable_on(matrices.device):
        normalise_kernels.normalise(matrices, out, margin, SMALLEST_NORM)
        return
    # By the largest element first: then squares neither overflow nor vanish.
    largest = torch.linalg.vector_norm(matrices, ord=torch.inf, dim=(-2, -1)).float().clamp_(min=SMALLEST_NORM)
    relative = matrices.to(torch.float32, copy=True).div_(largest[:, None, None])
    norm = torch.linalg.vector_norm(relative, dim=(-2, -1)).mul_(largest).clamp_(min=SMALLEST_NORM)
    torch.mul(relative, (largest / (norm * margin))[:, None, None], out=relative)
    out.copy_(relative)
