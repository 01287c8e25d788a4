"""The Muon part: momentum, polar factor and update of one rank's pieces. The math, without the schedule.

    B <- momentum B + (1 - momentum) G            in fp32, stored through a codec
    U  = polar((1 - momentum) G + momentum B)     with Nesterov, else polar(B); of the whole matrix, on its owner
    W <- (1 - lr weight_decay) W - lr scale(rows, cols) U

Source: Keller Jordan, https://kellerjordan.github.io/posts/muon; decoupled weight decay and the scale that matches
AdamW's update RMS: "Muon is Scalable for LLM Training", arXiv 2502.16982. The polar factor is taken of the momentum
before it is stored, so a codec's error enters only with the next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muon_dist import kernels
from muon_dist.exchange import PackedPiece
from muon_dist.layout import Matrix, Rect
from muon_dist.options import Options, PolarForm, UpdateScale
from muon_dist.polar import Schedule, default_dtype, polar_factor
from muon_dist.shards import Shard
from muon_dist.stacks import AccumulateStacks, Member, accumulate_pieces
from muon_dist.staging import on_device
from muon_dist.state import StoredTensor, momentum_of
from muon_dist.wire import WireFormat

if kernels.HAS_TRITON:
    from muon_dist.kernels import batches
    from muon_dist.kernels import momentum as momentum_kernels
    from muon_dist.kernels.batches import AccumulateBatch, ApplyBatch

# Factor on an orthogonal update of [rows, cols]. Its RMS is 1/sqrt(max(rows, cols)) before.
UPDATE_SCALES: dict[UpdateScale, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    "spectral": lambda rows, cols: math.sqrt(max(1, rows / cols)),
    "none": lambda rows, cols: 1.0,
}


@dataclass(frozen=True)
class MuonParameter:
    """One matrix parameter on this rank."""

    shard: Shard
    matrix: Matrix
    momentum: StoredTensor

    @classmethod
    def of(cls, shard: Shard, options: Options) -> MuonParameter:
        """Raises ValueError for a parameter that Muon cannot take."""
        matrix = Matrix(shard.name, shard.geometry())
        try:
            momentum = momentum_of(shard.momentum_layout(options.block_size), options, shard.prefix)
        except ValueError as error:
            raise ValueError(f"{shard.name}: {error}") from None
        return cls(shard, matrix, momentum)

    def create_state(self) -> None:
        """Adds what is missing to the parameter's state."""
        self.momentum.create(self.shard.state)

    def accumulate(
        self, rect: Rect, wire: WireFormat, packed: Tensor, batch: AccumulateBatch | None, stacks: AccumulateStacks
    ) -> None:
        """Takes the gradient into the momentum and packs what is to be orthogonalised; zeros where there is none.

        Args:
            batch, stacks: may take the work, to be launched later; the first is None if there are no kernels.
        """
        gradient = self.shard.gradient()
        if gradient is None:
            packed.zero_()  # zeros in every wire format
            return
        g = gradient[rect.relative_to(self.shard.rect).slices]
        buffers = self.momentum.buffers(self.shard.state)
        if not self.momentum.codec.row_wise and g.device == packed.device:
            stacks.take(self.momentum.codec, Member(g, buffers, packed), *self._decays)
            return
        if batch is not None and g.device == packed.device:
            momentum, out = self.momentum.codec.for_kernels(buffers), wire.for_kernels(packed, *g.shape)
            if kernels.fit(g.shape, momentum, out) and batch.take(g, momentum, out, *self._decays):
                return
        with on_device(buffers, packed.device) as here:
            self._accumulate(g.to(packed.device, non_blocking=True), here, wire, packed)

    def _accumulate(self, g: Tensor, buffers: Mapping[str, Tensor], wire: WireFormat, packed: Tensor) -> None:
        codec = self.momentum.codec
        beta, nesterov = self._decays
        if not codec.row_wise:
            accumulate_pieces(codec, [Member(g, buffers, packed)], wire, beta, nesterov)
            return
        if kernels.usable_on(g.device):
            momentum, out = codec.for_kernels(buffers), wire.for_kernels(packed, *g.shape)
            if kernels.fit(g.shape, momentum, out) and g.stride(1) == 1:
                momentum_kernels.accumulate(g, momentum, out, beta, nesterov)
                return
        g = g.float()
        m = codec.decode(buffers, g.shape[1]).lerp_(g, 1 - beta)
        codec.encode(m, buffers)
        u = g.lerp(m, beta) if nesterov else m
        wire.pack(u.unsqueeze(0), packed.unsqueeze(0))

    def apply(self, rect: Rect, wire: WireFormat, packed: Tensor, batch: ApplyBatch | None) -> None:
        """Decays and updates the rectangle ``rect`` of the parameter; without a gradient it stays as it is."""
        if not self.shard.has_gradient:
            return
        part = self.shard.weight()[rect.relative_to(self.shard.rect).slices]
        if batch is not None and part.device == packed.device:
            update = wire.back.for_kernels(packed, *part.shape)
            if kernels.fit(part.shape, update) and batch.take(part, update, *self.factors):
                return
        with on_device({"weight": part}, packed.device) as here:
            self._apply(here["weight"], wire, packed)

    def _apply(self, weight: Tensor, wire: WireFormat, packed: Tensor) -> None:
        decay, factor = self.factors
        if kernels.usable_on(weight.device):
            encoded = wire.back.for_kernels(packed, *weight.shape)
            if kernels.fit(weight.shape, encoded) and weight.stride(1) == 1:
                momentum_kernels.apply(weight, encoded, decay, factor)
                return
        (update,) = wire.back.unpack(packed.unsqueeze(0), *weight.shape)
        wide = weight.float()  # the weight itself where it is fp32 already
        wide.mul_(decay).add_(update, alpha=factor)
        if wide is not weight:
            weight.copy_(wide)

    @property
    def _decays(self) -> tuple[float, bool]:
        """Of the momentum, and whether it looks ahead."""
        return self.shard.group["momentum"], self.shard.group["nesterov"]

    @property
    def factors(self) -> tuple[float, float]:
        """Of the weight, and of the update that is added."""
        group, (rows, cols) = self.shard.group, self.shard.shape
        lr = float(group["lr"])
        return 1 - lr * group["weight_decay"], -lr * UPDATE_SCALES[group["update_scale"]](rows, cols)


@dataclass(frozen=True)
class MuonWork:
    """The work of one plan, as :class:`muon_dist.pipeline.MatrixWork`; parameters in the plan's order."""

    parameters: Sequence[MuonParameter]
    wire: WireFormat
    schedule: Schedule
    form: PolarForm
    dtype: torch.dtype | None

    def accumulate(self, pieces: Sequence[PackedPiece]) -> None:
        batch = batches.AccumulateBatch() if pieces and kernels.usable_on(pieces[0].packed.device) else None
        stacks = AccumulateStacks(self.wire)
        for matrix, rect, packed in pieces:
            self.parameters[matrix].accumulate(rect, self.wire, packed, batch, stacks)
        stacks.launch()
        if batch is not None:
            batch.launch()

    def polar(self, matrices: Tensor, out: Tensor | None) -> Tensor:
        dtype = self.dtype or default_dtype(matrices.device)
        fits = out is not None and out.dtype == dtype
        return polar_factor(matrices, self.schedule, form=self.form, dtype=dtype, out=out if fits else None)

    def apply(self, pieces: Sequence[PackedPiece]) -> None:
        batch = batches.ApplyBatch() if pieces and kernels.usable_on(pieces[0].packed.device) else None
        for matrix, rect, packed in pieces:
            self.parameters[matrix].apply(rect, self.wire, packed, batch)
        if batch is not None:
            batch.launch()
