"""The polar factor by Newton-Schulz: batched, and with most of the work on Gram matrices.

For M = U S V^T the polar factor is U V^T: M with all its singular values set to one. Odd polynomials are applied to the
singular values, some of them on the Gram matrix alone before the matrix itself is multiplied (see ``chains.py``). With
s <= l the sides of the matrix, and symmetric products of which half is computed:

- doubling: two polynomials, of degree 65 and 33, each a segment of its own: 6 s^2 l + 9 s^3 FLOPs. Or, where kernels
  keep what is lost to rounding, one segment of both: 3 s^2 l + 17 s^3, fewer from about l = 2.7 s on.
- five iterations of degree 5 in the standard form, a segment each: 15 s^2 l + 5 s^3.
- the same in the Gram form, two iterations and then three at a time: 6 s^2 l + 14 s^3, fewer from about l = 2 s on.
  Source: Gram Newton-Schulz, https://github.com/Dao-AILab/gram-newton-schulz.

A long segment loses the small singular values to cancellation, since squaring them in the Gram matrix halves their
digits. Forming the Gram matrix anew, when they have grown by about 40, brings them back, and so does keeping twice as
many digits of it; and fp16, with three bits more of mantissa than bf16 and all values at most about 1, is its type of
choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from muon_dist.kernels import Chain, chain_takes
from muon_dist.options import PolarForm
from muon_dist.polar.chains import doubling, doubling_twice, iterations
from muon_dist.polar.coefficients import Schedule
from muon_dist.polar.products import is_one_launch, multiply_chain, normalised, times

# From this ratio of the sides on, two doubling polynomials are faster as one segment: at 2.69 an H200 takes 2% longer
# for one, at 3 5% longer for two.
JOINED_FROM_ASPECT = 2.75
# And iterations of degree 5 in the Gram form.
GRAM_FROM_ASPECT = 2.0
# There the Gram matrix is formed anew after the first two iterations, and then after every third. What rounding makes
# of singular values that are zero are small eigenvalues of either sign, and each iteration multiplies them by up to 16:
# in fp16, three leave them below one.
FIRST_SEGMENT, LATER_SEGMENTS = 2, 3


def polar_factor(
    matrices: Tensor,
    schedule: Schedule,
    *,
    form: PolarForm = "auto",
    dtype: torch.dtype | None = None,
    bound: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Approximate polar factors of a batch of matrices.

    Args:
        matrices: ``[..., rows, cols]``, floating point. Zero matrices give zero. Not modified, but where ``out`` lies.
        schedule: steps to take, see :func:`muon_dist.polar.coefficients.schedule`.
        form: of iterations of degree 5: "standard", "gram", or "auto": whichever needs fewer FLOPs for this shape.
        dtype: arithmetic of the iteration; by default fp16 on accelerators and fp32 on CPU, where half-precision
            products are about a hundred times slower.
        bound: on the norms of all matrices, where one is known; otherwise each is divided by its Frobenius norm.
        out: where to put the result, of ``dtype``; contiguous within a matrix. It may be the memory of ``matrices``, if
            their elements are as large.

    Returns:
        ``[..., rows, cols]`` in ``dtype``.
    """
    if dtype is None:
        dtype = default_dtype(matrices.device)
    rows, cols = matrices.shape[-2:]
    if out is None:
        out = torch.empty(matrices.shape, dtype=dtype, device=matrices.device)
    result = out.view(-1, rows, cols)
    in_one_launch = is_one_launch(result if rows <= cols else result.mT)
    segments = _segments(rows, cols, schedule, form, in_one_launch)
    # Two memories take turns with each product of a whole matrix; start with the one that makes the last end in out.
    turns = (torch.empty_like(result), result)
    current, other = turns if len(segments) % 2 else turns[::-1]
    if matrices.stride()[-2:] != (cols, 1):  # cut out of a larger matrix, or a transpose
        matrices = matrices.contiguous()
    matrices = matrices.reshape(-1, rows, cols)
    factors = None
    if bound is None:
        factors = normalised(matrices, schedule.margin, out=current, exactly=in_one_launch)
    else:
        torch.mul(matrices, 1 / (bound * schedule.margin), out=current)
    if rows > cols:
        current, other = current.mT, other.mT  # [n, s, l] with s <= l from here on; the memory stays as it is
    for segment in segments:
        q = multiply_chain(current, segment, factors)
        current, other = times(q, current, out=other), current
        del q  # with its memory, before the next chain takes as much
        factors = None  # the first Q had them
    return out


def workspace_elements(
    rows: int, cols: int, schedule: Schedule, form: PolarForm = "auto", dtype: torch.dtype = torch.float32
) -> int:
    """Elements of ``dtype``, at most, that :func:`polar_factor` needs for one matrix beside its input and result.

    That is the other of the two memories that take turns, and Gram matrices and polynomials of them.

    (Without kernels the norm needs one more copy in fp32, before the iteration: more than this where matrices are more
    than four times as long as wide.)
    """
    short, long = sorted((rows, cols))
    segments = _segments(rows, cols, schedule, form, chain_takes(short, long, dtype))
    squares = max(segment.slots for segment in segments)
    return short * (long + squares * short)


def _segments(rows: int, cols: int, schedule: Schedule, form: PolarForm, in_one_launch: bool) -> list[Chain]:
    """What is done between products with the whole matrix; ``in_one_launch`` if kernels do a chain as a whole."""
    short, long = sorted((rows, cols))
    if schedule.doublings:
        if len(schedule.doublings) == 2 and in_one_launch and long >= JOINED_FROM_ASPECT * short:
            return [doubling_twice(*schedule.doublings)]
        return [doubling(step) for step in schedule.doublings]
    triples = schedule.iterations
    if form == "auto":
        form = "gram" if long >= GRAM_FROM_ASPECT * short else "standard"
    if form == "standard":
        return [iterations((triple,)) for triple in triples]
    later = range(FIRST_SEGMENT, len(triples), LATER_SEGMENTS)
    groups = [triples[:FIRST_SEGMENT], *(triples[i : i + LATER_SEGMENTS] for i in later)]
    return [iterations(group) for group in groups]


def default_dtype(device: torch.device) -> torch.dtype:
    """Arithmetic of the iteration on ``device``."""
    return torch.float32 if device.type == "cpu" else torch.float16
