"""The products that Newton-Schulz is made of: with a symmetric result, so that half of it need not be computed; with a
symmetric factor, so that tall matrices need not be transposed; and with a factor a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from muon_dist import kernels

if kernels.HAS_TRITON:
    from muon_dist.kernels import scale as scale_kernels
    from muon_dist.kernels import symmetric as symmetric_kernels


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


def times_symmetric(q: Tensor, x: Tensor) -> Tensor:
    """Q X for a symmetric Q, ``[n, s, s]``, and ``[n, s, l]``; laid out in memory as x is."""
    if x.stride(-1) != 1:
        return torch.bmm(x.mT, q).mT
    return torch.bmm(q, x)


def scaled(matrices: Tensor, factors: Tensor, *, out: Tensor) -> Tensor:
    """Each matrix times its factor, into ``out``. ``[n, rows, cols]`` and ``[n]``; all contiguous."""
    if kernels.usable_on(matrices.device):
        scale_kernels.scale(matrices, factors, out)
        return out
    return torch.mul(matrices, factors[:, None, None], out=out)
