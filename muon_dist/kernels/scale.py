"""Scales each matrix of a batch by a factor of its own; torch's product with a broadcast factor is not vectorised.

Reference: ``scaled`` in ``muon_dist/polar/products.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


def scale(matrices: Tensor, factors: Tensor, out: Tensor) -> None:
    """``out[i]`` <- ``factors[i]`` times ``matrices[i]``, in fp32 arithmetic.

    Args:
        matrices, out: [n, rows, cols], contiguous, any floating-point types; they may be the same.
        factors: n elements, fp32.
    """
    n, numel = matrices.shape[0], matrices.shape[1] * matrices.shape[2]
    _scale[(triton.cdiv(numel, _BLOCK), n)](matrices, factors, out, numel, BLOCK=_BLOCK)


@triton.jit
def _scale(matrices, factors, out, numel, BLOCK: tl.constexpr):
    matrix = tl.program_id(1).to(tl.int64)
    within = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(matrices + matrix * numel + within, mask=within < numel, other=0).to(tl.float32)
    tl.store(out + matrix * numel + within, values * tl.load(factors + matrix), mask=within < numel)
