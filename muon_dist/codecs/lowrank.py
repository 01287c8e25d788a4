"""grasp4 and lowrank4: a low-rank part that is followed from step to step, and what it leaves, in 4 bits.

    M = left right + rest        [rows, cols] = [rows, rank] [rank, cols] + [rows, cols]

Most of a momentum's energy lies in few directions. Taken out, they leave entries three times smaller, and so does the
noise of storing them in 4 bits: the noise is what hides the small singular values from the polar factor. The factors
come from one power iteration, started where the last step ended:

    left = orthonormal(M q), right = left^T M, with q the rows of the stored right factor, each divided by its norm

- grasp4 is 4-bit-Muon-GRASP (ICLR 2026, OpenReview g2l9bg9DWx): factors of rank min(rows, cols) / 16 in linear8, the
  residual of the exact factors in grid4.
- lowrank4 stores the factors in 4 bits too, which pays for twice the rank or more, and the residual of the *stored*
  factors, so that their rounding is not lost; without that it adds up over steps, as it does in "MuonQ", arXiv
  2605.11396. Rows have scales of their own; there are no scales of columns.

On a shard both work on the shard alone: no collective, exact decoding, the same bytes at any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muon_dist import kernels
from muon_dist.codecs.protocol import BufferSpec, Codec
from muon_dist.kernels import Encoded
from muon_dist.polar import polar_factor, schedule

if kernels.HAS_TRITON:
    from muon_dist.kernels import unit

# Six iterations bring singular values down to 1e-3 of the norm within half a per cent of one.
_ORTHONORMAL = schedule("polar_express", 6)
_SMALLEST_NORM = 2.0**-100


@dataclass(frozen=True)
class LowRank:
    """Two factors in one codec, the rest in another.

    Attributes:
        rank: of the low-rank part; the same on all ranks.
        cuts: into how many parts the rows and the columns of the state are cut.
        factors: row-wise; the left factor is stored by its rows, [rows, rank], the right by its own, [rank, cols].
        compensated: whether the rest is that of the factors as stored, not as computed.
    """

    name: str
    rank: int
    cuts: tuple[int, int]
    factors: Codec
    residual: Codec
    compensated: bool
    row_wise: bool = False

    def buffers(self, shape: Sequence[int]) -> dict[str, BufferSpec]:
        *stack, rows, cols = shape
        left = self.factors.buffers((*stack, rows, self.rank))
        right = self.factors.buffers((*stack, self.rank, cols))
        return {**_named("left", left), **_named("right", right), **self.residual.buffers(shape)}

    @property
    def factor_buffers(self) -> list[str]:
        """The names of the factors' buffers."""
        specs = self.factors.buffers((0, 0))
        return [*_named("left", specs), *_named("right", specs)]

    def whole(self, shape: Sequence[int]) -> dict[str, BufferSpec]:
        *stack, rows, cols = shape
        row_cuts, col_cuts = self.cuts
        left = {
            key: BufferSpec((*stack, rows, col_cuts * spec.shape[-1]), spec.dtype)
            for key, spec in self.factors.buffers((rows, self.rank)).items()
        }
        right = self.factors.buffers((*stack, row_cuts * self.rank, cols))
        return {**_named("left", left), **_named("right", right), **self.residual.whole(shape)}

    def for_kernels(self, buffers: Mapping[str, Tensor]) -> Encoded:
        raise NotImplementedError(f"{self.name} is not row-wise")

    def encode(self, values: Tensor, buffers: Mapping[str, Tensor]) -> None:
        _, right = self.decode_factors(buffers, values.shape[-1])
        self.residual.encode(values - self.follow(values, right, buffers), buffers)

    def decode(self, buffers: Mapping[str, Tensor], cols: int, out: Tensor | None = None) -> Tensor:
        return self.residual.decode(buffers, cols, out).add_(self.low(buffers, cols))

    def low(self, buffers: Mapping[str, Tensor], cols: int) -> Tensor:
        """The low-rank part as stored, ``[..., rows, cols]``; bf16 on accelerators, fp32 on CPU."""
        return torch.matmul(*self.decode_factors(buffers, cols))

    def decode_factors(self, buffers: Mapping[str, Tensor], cols: int) -> tuple[Tensor, Tensor]:
        """The factors as stored, ``[..., rows, rank]`` and ``[..., rank, cols]``, ready to be multiplied."""
        left, right = _named_so("left", buffers), _named_so("right", buffers)
        return self._decoded(left, self.rank), self._decoded(right, cols)

    def follow(self, values: Tensor, right: Tensor, buffers: Mapping[str, Tensor]) -> Tensor:
        """Takes one power iteration and stores the factors.

        Args:
            values: ``[..., rows, cols]``, floating point.
            right: the right factor as it was stored, ``[..., rank, cols]``.

        Returns:
            Their product, which the residual is to make up for.
        """
        values = values.to(right.dtype)
        p = _orthonormal(values @ _directions(right).mT).to(right.dtype)
        factors = p, p.mT @ values
        for factor, name in zip(factors, ("left", "right"), strict=True):
            self.factors.encode(factor, _named_so(name, buffers))
        return torch.matmul(*(self.decode_factors(buffers, values.shape[-1]) if self.compensated else factors))

    def _decoded(self, factor: Mapping[str, Tensor], cols: int) -> Tensor:
        """In bf16 on accelerators, whose rounding is far below a 4-bit code's; fp32 on CPU."""
        codes = factor["codes"]
        dtype = torch.float32 if codes.device.type == "cpu" else torch.bfloat16
        out = torch.empty((*codes.shape[:-1], cols), dtype=dtype, device=codes.device)
        return self.factors.decode(factor, cols, out)


@dataclass(frozen=True)
class Folded:
    """A codec of matrices for a run of a flattened matrix, ``[1, length]``: folded at the width of the matrix.

    Where the run starts inside a row, the columns are turned by as much, which leaves low rank low, within a factor of
    two, and no column of the fold mixes columns of the matrix.
    """

    codec: Codec
    width: int
    row_wise: bool = False

    @property
    def name(self) -> str:
        return self.codec.name

    def buffers(self, shape: Sequence[int]) -> dict[str, BufferSpec]:
        *stack, _, length = shape
        return self.codec.buffers((*stack, -(-length // self.width), self.width))

    def whole(self, shape: Sequence[int]) -> dict[str, BufferSpec]:
        return self.buffers(shape)  # what a run is a part of, only its engine knows

    def for_kernels(self, buffers: Mapping[str, Tensor]) -> Encoded:
        raise NotImplementedError(f"{self.name} is not row-wise")

    def encode(self, values: Tensor, buffers: Mapping[str, Tensor]) -> None:
        missing = -values.shape[-1] % self.width
        folded = torch.nn.functional.pad(values, (0, missing)).unflatten(-1, (-1, self.width)).flatten(-3, -2)
        self.codec.encode(folded, buffers)

    def decode(self, buffers: Mapping[str, Tensor], cols: int, out: Tensor | None = None) -> Tensor:
        run = self.codec.decode(buffers, self.width).flatten(-2)[..., :cols].unsqueeze(-2)
        return run.contiguous() if out is None else out.copy_(run)


def rank_of(share: float, rows: int, cols: int) -> int:
    """The rank at which both factors of a matrix of [rows, cols] have ``share`` times as many elements as it."""
    return max(1, aligned_rank(int(share * rows * cols / max(rows + cols, 1) + 1e-6)))


def aligned_rank(rank: int) -> int:
    """The next rank below whose rows in half precision lie at multiples of 16 bytes: other products are slow."""
    return rank - rank % 8 if rank > 8 else rank


def _directions(right: Tensor) -> Tensor:
    """The rows of a right factor, [..., rank, cols], divided by their norms; where there is none yet, or none any
    longer, waves of frequencies of their own, the same on every rank and at every start."""
    if kernels.usable_on(right.device):
        return unit.unit_rows(right, _SMALLEST_NORM)
    rank, cols = right.shape[-2:]
    norm = torch.linalg.vector_norm(right, dim=-1, keepdim=True)
    frequency, place = (torch.arange(1, n + 1, dtype=torch.float32, device=right.device) for n in (rank, cols))
    waves = torch.cos(frequency.sqrt().unsqueeze(1) * place).mul_((2 / cols) ** 0.5)
    return torch.where(norm < _SMALLEST_NORM, waves.to(right.dtype), right / norm.clamp(min=_SMALLEST_NORM))


def _orthonormal(vectors: Tensor) -> Tensor:
    """Columns that span what those of ``vectors`` span, [..., rows, rank]; by Newton-Schulz, which is products alone,
    and takes columns that are zero, or more than there are rows, without complaint."""
    # The Gram form needs full rank to be exact.
    return polar_factor(_unit_columns(vectors), _ORTHONORMAL, form="standard", bound=vectors.shape[-1] ** 0.5)


def _unit_columns(vectors: Tensor) -> Tensor:
    if kernels.usable_on(vectors.device):
        return unit.unit_columns(vectors, _SMALLEST_NORM)
    return vectors / torch.linalg.vector_norm(vectors, dim=-2, keepdim=True).clamp(min=_SMALLEST_NORM)


def _named(factor: str, specs: Mapping[str, BufferSpec]) -> dict[str, BufferSpec]:
    return {f"{factor}_{key}": spec for key, spec in specs.items()}


def _named_so(factor: str, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A factor's buffers, by the names that its own codec has for them."""
    prefix = f"{factor}_"
    return {key.removeprefix(prefix): buffer for key, buffer in buffers.items() if key.startswith(prefix)}
