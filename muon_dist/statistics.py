"""What a step did, in four numbers, without waiting for it: a watch around the work that the pipeline is given.

    update_rms           root mean square of what was added to an element of the matrices' weights, weight decay aside
    momentum_norm        Frobenius norm of all momentum, before it was stored
    quantisation_error   relative error of storing it, of this step alone
    polar_residual       |U U^T - I| / sqrt(s) of the polar factors U, s x l with s <= l; the mean over matrices. An
                         exact one has 0, a zero matrix 1

Everything is added up on the device and reduced over the ranks there. Watching changes no bit of the step; it costs a
decoded copy of a chunk's momentum, a product per batch, and small kernels for every piece.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from muon_dist.exchange import PackedPiece
from muon_dist.layout import Rect
from muon_dist.muon import MuonMatrix, MuonWork
from muon_dist.pipeline import MatrixWork

# Positions in the sums.
_UPDATE, _UPDATED, _MOMENTUM, _ERROR, _RESIDUAL, _MATRICES = range(6)


class Observer:
    """Watches the steps that are made while ``observing``.

    Attributes:
        observing: whether to watch; the same on all ranks, since what is seen is reduced over them. It is read when a
            step begins: at ``step()``, or at the start of ``during_backward()``.
        latest: of the last call of ``step()`` that was watched and had matrices: 0-dimensional fp32 tensors on the
            device of the parameters, the same on all ranks. Reading one waits for it.
    """

    def __init__(self) -> None:
        self.observing = False
        self.latest: dict[str, Tensor] = {}

    def begin(self, device: torch.device) -> Observation:
        """Of one step, whose parameters are computed on ``device``."""
        return Observation(device, self.observing)

    def end(self, observation: Observation) -> None:
        """The step is done. Collective if it was watched."""
        if observation.watched:
            self.latest = _figures([work.reduced(group) for work, group in observation.watched])


class Observation:
    """What is watched in one step."""

    def __init__(self, device: torch.device, observing: bool) -> None:
        self.watched: list[tuple[_WatchedWork, dist.ProcessGroup | None]] = []
        self._device = device
        self._observing = observing

    def watch(self, work: MuonWork, group: dist.ProcessGroup | None) -> MatrixWork:
        """What the pipeline is to be given for ``work``."""
        if not self._observing:
            return work
        watched = _WatchedWork(work, self._device)
        self.watched.append((watched, group))
        return watched


class _WatchedWork:
    """:class:`muon_dist.pipeline.MatrixWork` that does what ``work`` does and adds up what it sees on this rank."""

    def __init__(self, work: MuonWork, device: torch.device) -> None:
        self._work = work
        self._sums = torch.zeros(6, device=device)

    def accumulate(self, pieces: Sequence[PackedPiece]) -> None:
        seen = [
            (self._work.matrices[piece.matrix], piece.rect, exact)
            for piece in pieces
            if (exact := _next_momentum(self._work.matrices[piece.matrix], piece.rect)) is not None
        ]
        self._work.accumulate(pieces)
        for matrix, rect, exact in seen:
            norm = torch.linalg.vector_norm(exact)
            error = torch.linalg.vector_norm(exact.sub_(_momentum(matrix, rect, exact.device)))
            # Where several ranks keep the same momentum, each counts its part.
            share = 1 / (1 + len(matrix.matrix.geometry.pieces[0].kept_by))
            self._add(_MOMENTUM, norm.square(), share)
            self._add(_ERROR, error.square(), share)

    def polar(self, matrices: Tensor, out: Tensor | None) -> Tensor:
        factors = self._work.polar(matrices, out)
        wide = factors if factors.shape[-2] <= factors.shape[-1] else factors.mT
        gram = torch.bmm(wide, wide.mT)
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        residuals = torch.linalg.vector_norm(gram, dim=(-2, -1), dtype=torch.float32)
        self._add(_RESIDUAL, residuals.sum(), wide.shape[-2] ** -0.5)
        self._sums[_MATRICES] += len(factors)
        return factors

    def apply(self, pieces: Sequence[PackedPiece]) -> None:
        self._work.apply(pieces)
        for index, rect, packed in pieces:
            matrix = self._work.matrices[index]
            if self._work.updates(index):
                _, factor = matrix.factors
                update = self._work.wire.back.unpack(packed.unsqueeze(0), rect.rows, rect.cols)
                self._add(_UPDATE, torch.linalg.vector_norm(update, dtype=torch.float32).square(), factor**2)
                self._sums[_UPDATED] += rect.numel

    def reduced(self, group: dist.ProcessGroup | None) -> Tensor:
        """The sums of all ranks."""
        if group is not None:
            dist.all_reduce(self._sums, group=group)
        return self._sums

    def _add(self, position: int, value: Tensor, factor: float) -> None:
        self._sums[position].add_(value.to(self._sums.device, non_blocking=True), alpha=factor)


def _next_momentum(matrix: MuonMatrix, rect: Rect) -> Tensor | None:
    """The piece's momentum as the step will make it, fp32, before it is stored; None where there is no gradient."""
    gradient = matrix.gradient(rect)
    if gradient is None:
        return None
    return _momentum(matrix, rect, gradient.device).lerp_(gradient.float(), 1 - matrix.shard.group["momentum"])


def _momentum(matrix: MuonMatrix, rect: Rect, device: torch.device) -> Tensor:
    """As it is stored on this rank, [rows, cols], in memory of its own on ``device``: what lies on the host may still
    be being written."""
    codec, buffers = matrix.stored(rect)
    return codec.decode({name: buffer.to(device, non_blocking=True) for name, buffer in buffers.items()}, rect.cols)


def _figures(sums: Sequence[Tensor]) -> dict[str, Tensor]:
    total = torch.stack(list(sums)).sum(dim=0)
    return {
        "update_rms": (total[_UPDATE] / total[_UPDATED]).sqrt(),
        "momentum_norm": total[_MOMENTUM].sqrt(),
        "quantisation_error": (total[_ERROR] / total[_MOMENTUM]).sqrt(),
        "polar_residual": total[_RESIDUAL] / total[_MATRICES],
    }
