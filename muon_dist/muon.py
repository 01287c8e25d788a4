"""The Muon part: momentum, polar factor and update of one rank's pieces. The math, without the schedule.

    B <- momentum B + (1 - momentum) G            in fp32, stored through a codec
    U  = polar((1 - momentum) G + momentum B)     with Nesterov, else polar(B); of the whole matrix, on its owner
    W <- (1 - lr weight_decay) W - lr scale(rows, cols) U

Source: Keller Jordan, https://kellerjordan.github.io/posts/muon; decoupled weight decay and the scale that matches
    AdamW's update RMS: "Muon is Scalable for LLM Training", arXiv 2502.16982. The polar factor is taken of the
    momentum before it is stored, so a codec's error enters only with the next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muon_dist.layout import Matrix, Rect
from muon_dist.options import PolarForm, UpdateScale
from muon_dist.polar import Schedule, polar_factor
from muon_dist.sharding import local, local_gradient
from muon_dist.state import StoredTensor

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
    held: Rect  # whose momentum is kept here
    stored: Rect  # of the parameter itself

    def create_state(self) -> None:
        """Adds what is missing to the parameter's state."""
        self.momentum.create(self.state)

    def accumulate(self, rect: Rect) -> Tensor:
        """Takes the gradient into the momentum; returns what is to be orthogonalised, fp32. Zeros if it has none."""
        if rect != self.held:
            raise AssertionError(f"{self.matrix.name}: asked for {rect}, holds {self.held}")
        gradient = local_gradient(self.parameter)
        if gradient is None:
            return torch.zeros((rect.rows, rect.cols), device=self.momentum.device)
        g = gradient[rect.relative_to(self.stored).slices].float()
        beta = self.group["momentum"]
        buffers = self.momentum.buffers(self.state)
        m = self.momentum.codec.decode(buffers).lerp_(g, 1 - beta)
        self.momentum.codec.encode(m, buffers)
        return g.lerp(m, beta) if self.group["nesterov"] else m

    def apply(self, rect: Rect, update: Tensor) -> None:
        """Decays and updates the rectangle ``rect`` of the parameter; without a gradient it stays as it is."""
        if self.parameter.grad is None:
            return
        weight = local(self.parameter)[rect.relative_to(self.stored).slices]
        wide = weight.float()  # the weight itself where it is fp32 already
        scale = UPDATE_SCALES[self.group["update_scale"]](self.matrix.geometry.rows, self.matrix.geometry.cols)
        lr = float(self.group["lr"])
        wide.mul_(1 - lr * self.group["weight_decay"]).add_(update, alpha=-lr * scale)
        if wide is not weight:
            weight.copy_(wide)


@dataclass(frozen=True)
class MuonWork:
    """The work of one plan, as :class:`muon_dist.pipeline.MatrixWork`; parameters in the plan's order."""

    parameters: Sequence[MuonParameter]
    schedule: Schedule
    form: PolarForm
    dtype: torch.dtype | None

    def accumulate(self, matrix: int, rect: Rect) -> Tensor:
        return self.parameters[matrix].accumulate(rect)

    def polar(self, matrices: Tensor) -> Tensor:
        return polar_factor(matrices, self.schedule, form=self.form, dtype=self.dtype)

    def apply(self, matrix: int, rect: Rect, update: Tensor) -> None:
        self.parameters[matrix].apply(rect, update)
