"""Newton-Schulz coefficients, each table with its source.

A schedule is a few odd polynomials, applied to the singular values of a matrix one after the other; after the last one
those that started between about 1e-3 and 1 are near 1. The published tables have polynomials of degree 5,
a s + b s^3 + c s^5, a triple each. Ours has two, of degree 65 and 33, made of products that each double the degree.
"""

from __future__ import annotations

from dataclasses import dataclass

from muon_dist.options import Polar

Triple = tuple[float, float, float]


Quadruple = tuple[float, float, float, float]

# An odd polynomial s q(s^2) whose degree doubles with each product of the Gram matrix R = X X^T, (a, b, c, d) of each:
#     A_0 = R,    A_i = a I + b R + c A_{i-1} + d A_{i-1}^2,    q(R) is the last
Doubling = tuple[Quadruple, ...]


@dataclass(frozen=True)
class Schedule:
    """Polynomials of one kind, and by how much more than its Frobenius norm the input is divided first."""

    iterations: tuple[Triple, ...] = ()
    doublings: tuple[Doubling, ...] = ()
    margin: float = 1.0


# Keller Jordan, https://github.com/KellerJordan/Muon; the one triple of torch.optim.Muon. Fast rather than exact:
# singular values end between 0.68 and 1.13.
_JORDAN: Triple = (3.4445, -4.7750, 2.0315)

# Jiacheng You, in https://github.com/KellerJordan/modded-nanogpt and Emerging-Optimizers ("quintic").
_JIACHENG: tuple[Triple, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

# Grishina, Smirnov, Rakhuba, "Accelerating Newton-Schulz Iteration for Orthogonalization via Chebyshev-type
# Polynomials" (CANS), arXiv 2506.10935; digits as in NVIDIA-NeMo/Emerging-Optimizers.
_CANS: tuple[Triple, ...] = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)

# Amsel, Persson, Musco, Gower, "The Polar Express", arXiv 2505.16932: the paper's listing, for singular values down
# to 1e-3. All but the last are used with the paper's safety factor for low precision. Further iterations repeat the
# last.
_POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_SAFETY = 1.01

# Ours. Each polynomial is, of those of its kind, the one found to map an interval to the narrowest one in ratio: the
# first [1.22e-3, 1] to [0.057, 0.94], the second that to [0.845, 1.095]; five steps of Polar Express as
# gram-newton-schulz takes them, with 14 products of Gram matrices instead of 9, map it to [0.846, 1.124]. The first
# adds no identity before its last product: what singular values of 1e-3 make of R is as small as the rounding of 1 in
# fp16. That it ends at 0.94 leaves room for rounding, as the second grows steeply from one on. That the second ends
# about 0.97 makes both multiply the smallest singular values, and what noise has mixed into them, by 800, no more than
# those five steps do (804). benchmarks/coefficients.py finds them again, to 0.1% of their ratios. November 2026.
_DOUBLING: tuple[Doubling, ...] = (
    (
        (0.0, -3.83581327, 0.0, 3.67836586),
        (0.0, 0.221640587, 3.83998875, 3.55596175),
        (0.0, 0.323871579, 3.71061307, 3.39064411),
        (0.0, 0.280682382, 3.30535712, 2.71994594),
        (47.0118865, -0.806977083, 116.355685, 73.0679395),
    ),
    (
        (-1.01660527, 5.06803205, 0.0, -4.12684052),
        (0.538796959, -0.338123306, 0.0, -1.53768614),
        (0.00931435565, 0.734877023, 0.0, -1.01172862),
        (4.06671489, -8.31852693, 0.0, 10.6995953),
    ),
)


def schedule(name: Polar, steps: int | None = None) -> Schedule:
    """The first ``steps`` of the table called ``name``; by default five, and both of ``doubling``.

    Raises:
        ValueError: more steps than the table has; ``jordan`` and ``polar_express`` go on for ever.
    """
    if name == "jordan":
        return Schedule((_JORDAN,) * (steps or 5))
    if name == "polar_express":
        safe = tuple((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:-1])
        endless = safe + (_POLAR_EXPRESS[-1],) * max(1, (steps or 5) - len(safe))
        return Schedule(endless[: steps or 5], margin=_SAFETY)
    if name == "doubling":
        found = Schedule(doublings=_DOUBLING[:steps], margin=_SAFETY)
    else:
        found = Schedule((_CANS if name == "cans" else _JIACHENG)[:steps])
    there = len(found.iterations) + len(found.doublings)
    if steps is not None and steps > there:
        raise ValueError(f"polar_steps={steps}: the table {name!r} has {there} steps; use fewer or polar_express")
    return found
