"""Newton-Schulz coefficients, each table with its source.

One iteration maps every singular value s of a matrix to a s + b s^3 + c s^5. A schedule is one such triple an
iteration; after the last one the singular values that started between about 1e-3 and 1 are near 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from muon_dist.options import Polar

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Schedule:
    """The iterations to run, and by how much more than its Frobenius norm the input is divided first."""

    coefficients: tuple[Triple, ...]
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


def schedule(name: Polar, steps: int) -> Schedule:
    """The first ``steps`` iterations of the table called ``name``.

    Raises:
        ValueError: more steps than the table has; ``jordan`` and ``polar_express`` go on for ever.
    """
    if name == "jordan":
        return Schedule((_JORDAN,) * steps)
    if name == "polar_express":
        safe = tuple((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:-1])
        endless = safe + (_POLAR_EXPRESS[-1],) * max(1, steps - len(safe))
        return Schedule(endless[:steps], margin=_SAFETY)
    table = _CANS if name == "cans" else _JIACHENG
    if steps > len(table):
        raise ValueError(
            f"polar_steps={steps}: the table {name!r} has {len(table)} iterations; use fewer or polar_express"
        )
    return Schedule(table[:steps])
