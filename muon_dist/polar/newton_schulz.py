"""The polar factor by Newton-Schulz: batched, in the standard and in the Gram form.

For M = U S V^T the polar factor is U V^T: M with all its singular values set to one. Both forms apply the same odd
polynomials to the singular values; they differ in what they multiply. With s <= l the sides of the matrix:

- standard form: each iteration multiplies the whole [s, l] matrix; 3 s^2 l + s^3 FLOPs an iteration.
- Gram form: iterates on the [s, s] Gram matrix and multiplies the whole matrix only once before the restart and once
  at the end; cheaper from about l = 2 s on. Source: Gram Newton-Schulz,
  https://github.com/Dao-AILab/gram-newton-schulz.

The Gram form loses the small singular values to cancellation, since squaring them in the Gram matrix halves their
digits. Forming the Gram matrix anew after the second iteration, when they have grown by about 30, brings them back;
and fp16, with three bits more of mantissa than bf16 and all values at most about 1, is its type of choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from muon_dist.options import PolarForm
from muon_dist.polar.coefficients import Schedule, Triple
from muon_dist.polar.products import scaled, symmetric_product, times_symmetric

# From this ratio of the sides on, the Gram form needs fewer FLOPs.
GRAM_FROM_ASPECT = 2.0
# The Gram matrix is formed anew after this many iterations.
RESTART_AFTER = 2
# Matrices whose largest element is below this count as zero: so does, about, their polar factor.
SMALLEST_ELEMENT = 1e-30


def polar_factor(
    matrices: Tensor, schedule: Schedule, *, form: PolarForm = "auto", dtype: torch.dtype | None = None
) -> Tensor:
    """Approximate polar factors of a batch of matrices.

    Args:
        matrices: ``[..., rows, cols]``, floating point. Zero matrices give zero. Not modified.
        schedule: iterations to run, see :func:`muon_dist.polar.coefficients.schedule`.
        form: "standard", "gram", or "auto": whichever needs fewer FLOPs for this shape.
        dtype: arithmetic of the iteration; by default fp16 on accelerators and fp32 on CPU, where half-precision
            products are about a hundred times slower.

    Returns:
        ``[..., rows, cols]`` in ``dtype``.
    """
    if dtype is None:
        dtype = torch.float32 if matrices.device.type == "cpu" else torch.float16
    rows, cols = matrices.shape[-2:]
    x = _normalised(matrices.reshape(-1, rows, cols).contiguous(), schedule.margin, dtype)
    if rows > cols:
        x = x.mT  # [n, s, l] with s <= l from here on; the memory stays as it is
    if form == "auto":
        form = "gram" if x.shape[-1] >= GRAM_FROM_ASPECT * x.shape[-2] else "standard"
    x = (_gram_form if form == "gram" else _standard_form)(x, schedule.coefficients)
    return (x.mT if rows > cols else x).view(matrices.shape)


def _normalised(matrices: Tensor, margin: float, dtype: torch.dtype) -> Tensor:
    """``[n, rows, cols]`` divided by ``margin`` times their Frobenius norms, in ``dtype``.

    In two steps, each in one pass and without a copy in a wider type: to elements of at most one, whose squares neither
    overflow nor vanish, and to the norm.
    """
    largest = torch.linalg.vector_norm(matrices, ord=torch.inf, dim=(-2, -1)).float()
    x = torch.empty(matrices.shape, dtype=dtype, device=matrices.device)
    scaled(matrices, largest.clamp_(min=SMALLEST_ELEMENT).reciprocal_(), out=x)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float32)
    return scaled(x, norm.clamp_(min=1.0).mul_(margin).reciprocal_(), out=x)


def _standard_form(x: Tensor, coefficients: tuple[Triple, ...]) -> Tensor:
    """X <- P X with P = a I + b R + c R^2 and R = X X^T, once for each triple. ``x`` is ``[n, s, l]``."""
    for triple in coefficients:
        x = times_symmetric(_iteration(symmetric_product(x, x), triple), x)
    return x


def _gram_form(x: Tensor, coefficients: tuple[Triple, ...]) -> Tensor:
    """The same map as :func:`_standard_form`, collected in Q: the result is Q X.

    Q, P and the Gram matrix R are polynomials of the same symmetric matrix: they commute and stay symmetric.
    """
    for segment in (coefficients[:RESTART_AFTER], coefficients[RESTART_AFTER:]):
        if not segment:
            continue
        r = symmetric_product(x, x)
        q = p = _iteration(r, segment[0])
        for triple in segment[1:]:
            r = symmetric_product(symmetric_product(p, r), p)
            p = _iteration(r, triple)
            q = symmetric_product(q, p)
        x = times_symmetric(q, x)
    return x


def _iteration(gram: Tensor, triple: Triple) -> Tensor:
    """P = a I + b R + c R^2 for Gram matrices R, ``[n, s, s]``."""
    a, b, c = triple
    return symmetric_product(gram, gram, add=gram, alpha=c, beta=b, diagonal=a)
