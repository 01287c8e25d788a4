"""AdamW for every parameter, both moments in a codec: what Muon with quantised momentum is compared with.

The optimizer of the package offers the dynamic map only, since the linear one diverges; here is how one sees that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from muon_dist.codecs import make_codec
from muon_dist.options import RowWiseState
from muon_dist.state import SMALLEST_QUANTISED


class BlockwiseAdamW(torch.optim.Optimizer):
    """torch's fused AdamW on decoded moments, encoded again after each step.

    Args:
        state: codec of both moments.
        block_size: elements that share a scale.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        state: RowWiseState,
        block_size: int = 128,
    ) -> None:
        self._state, self._block = state, block_size
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, self.state[p], group)

    def _update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        name: RowWiseState = self._state if p.ndim == 2 and p.numel() >= SMALLEST_QUANTISED else "fp32"
        codecs = {
            moment: make_codec(name, self._block, signed=moment == "exp_avg") for moment in ("exp_avg", "exp_avg_sq")
        }
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            for moment, codec in codecs.items():
                for buffer, spec in codec.buffers(p.shape).items():
                    state[moment + buffer] = torch.zeros(spec.shape, dtype=spec.dtype, device=p.device)
        buffers = {m: {b: state[m + b] for b in codec.buffers(p.shape)} for m, codec in codecs.items()}
        first, second = (codec.decode(buffers[moment], p.shape[-1]) for moment, codec in codecs.items())
        adamw(
            [p],
            [gradient],
            [first],
            [second],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )
        for moment, values in (("exp_avg", first), ("exp_avg_sq", second)):
            codecs[moment].encode(values, buffers[moment])
