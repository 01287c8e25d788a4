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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muon_dist import kernels
from muon_dist.layout import Matrix, Rect
from muon_dist.options import PolarForm, UpdateScale
from muon_dist.polar import Schedule, polar_factor
from muon_dist.sharding import local, local_gradient
from muon_dist.state import StoredTensor
from muon_dist.wire import WireFormat

if kernels.HAS_TRITON:
    from muon_dist.kernels import momentum as momentum_kernels

# Factor on an orthogonal update of [rows, cols]. Its RMS is 1/sqrt(max(rows, cols)) before.
UPDATE_SCALES: dict[UpdateScale, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    "spectral": lambda rows, cols: math.sqrt(max(1, rows / cols)),
    "none": lambda rows, cols: 1.0,
}


@dataclass(frozen=True)
class MuonParameter:
    """One matrix parameter on this rank: the rectangles of it that lie here."""

    matrix: Matrix
    parameter: Tensor
    group: dict[str, Any]
    state: dict[str, Any]
    momentum: StoredTensor
    stored: Rect  # of the parameter on this rank

    def create_state(self) -> None:
        """Adds what is missing to the parameter's state."""
        self.momentum.create(self.state)

    def accumulate(self, rect: Rect, wire: WireFormat, packed: Tensor) -> None:
        """Takes the gradient into the momentum and packs what is to be orthogonalised; zeros where there is none."""
        gradient = local_gradient(self.parameter)
        if gradient is None:
            packed.zero_()  # zeros in every wire format
            return
        g = gradient[rect.relative_to(self.stored).slices]
        codec, buffers = self.momentum.codec, self.momentum.buffers(self.state)
        beta, nesterov = self.group["momentum"], self.group["nesterov"]
        if kernels.usable_on(g.device):
            momentum, out = codec.for_kernels(buffers), wire.for_kernels(packed, rect.rows, rect.cols)
            if kernels.blocks_agree(rect.cols, momentum, out) and g.stride(1) == 1:
                momentum_kernels.accumulate(g, momentum, out, beta, nesterov)
                return
        g = g.float()
        m = codec.decode(buffers).lerp_(g, 1 - beta)
        codec.encode(m, buffers)
        u = g.lerp(m, beta) if nesterov else m
        wire.pack(u.unsqueeze(0), packed.unsqueeze(0))

    def apply(self, rect: Rect, wire: WireFormat, packed: Tensor) -> None:
        """Decays and updates the rectangle ``rect`` of the parameter; without a gradient it stays as it is."""
        if self.parameter.grad is None:
            return
        weight = local(self.parameter)[rect.relative_to(self.stored).slices]
        lr = float(self.group["lr"])
        decay = 1 - lr * self.group["weight_decay"]
        scale = UPDATE_SCALES[self.group["update_scale"]](self.matrix.geometry.rows, self.matrix.geometry.cols)
        if kernels.usable_on(weight.device) and weight.stride(1) == 1:
            momentum_kernels.apply(weight, wire.for_kernels(packed, rect.rows, rect.cols), decay, -lr * scale)
            return
        (update,) = wire.unpack(packed.unsqueeze(0), rect.rows, rect.cols)
        wide = weight.float()  # the weight itself where it is fp32 already
        wide.mul_(decay).add_(update, alpha=-lr * scale)
        if wide is not weight:
            weight.copy_(wide)


@dataclass(frozen=True)
class MuonWork:
    """The work of one plan, as :class:`muon_dist.pipeline.MatrixWork`; parameters in the plan's order."""

    parameters: Sequence[MuonParameter]
    wire: WireFormat
    schedule: Schedule
    form: PolarForm
    dtype: torch.dtype | None

    def accumulate(self, matrix: int, rect: Rect, packed: Tensor) -> None:
        self.parameters[matrix].accumulate(rect, self.wire, packed)

    def polar(self, matrices: Tensor) -> Tensor:
        return polar_factor(matrices, self.schedule, form=self.form, dtype=self.dtype)

    def apply(self, matrix: int, rect: Rect, packed: Tensor) -> None:
        self.parameters[matrix].apply(rect, self.wire, packed)
