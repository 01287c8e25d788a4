"""The product that Newton-Schulz is made of: one whose result is symmetric, so that half of it need not be computed."""

from __future__ import annotations

import torch
from torch import Tensor

from muon_dist import kernels

if kernels.HAS_TRITON:
    from muon_dist.kernels import symmetric as symmetric_kernels


def symmetric_product(
    a: Tensor, b: Tensor, *, add: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0, diagonal: float = 0.0
) -> Tensor:
    """alpha A B^T + beta D + diagonal I, of a batch.

    Args:
        a, b: ``[n, s, k]`` with a symmetric A B^T: b is a, or both are polynomials of one symmetric matrix.
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
