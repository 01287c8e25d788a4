"""The optimizers that the benchmarks compare, each made for parameters that lie on a 1-D mesh (or for plain ones)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from muon_dist import DistMuon
from muon_dist.grouping import assign
from muon_dist.options import MomentumState, Wire
from muon_dist.sharding import local

Named = Sequence[tuple[str, nn.Parameter]]
ADAMW = "AdamW, fused"
ADAMW8 = "AdamW, 8-bit"  # DistMuon's AdamW part alone, both moments in dynamic8
TORCH_MUON = "torch Muon, gathered"


Make = Callable[[Named], list[Optimizer]]


class GatheredMuon(torch.optim.Muon):
    """torch.optim.Muon on sharded matrices: gradients are all-gathered, every rank orthogonalises all matrices, keeps
    the whole momentum, and takes its rows of the result."""

    def __init__(self, matrices: Iterable[Tensor], lr: float) -> None:
        self._matrices = list(matrices)
        self._whole = [nn.Parameter(_gathered(p)) for p in self._matrices]
        super().__init__(self._whole, lr=lr)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for p, whole in zip(self._matrices, self._whole, strict=True):
            whole.grad = None if p.grad is None else _gathered(p.grad).to(whole.dtype)
        super().step()
        for p, whole in zip(self._matrices, self._whole, strict=True):
            whole.grad = None
            part = local(p)
            index = p.device_mesh.get_local_rank() if isinstance(p, DTensor) else 0
            part.copy_(whole[index * len(part) : (index + 1) * len(part)])

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self._matrices:
            p.grad = None


@torch.no_grad()
def _gathered(tensor: Tensor) -> Tensor:
    """The whole of a matrix that ranks have equal parts of."""
    part = local(tensor)
    if not isinstance(tensor, DTensor) or tensor.device_mesh.size() == 1:
        return part
    whole = part.new_empty(tensor.shape)
    dist.all_gather_into_tensor(whole, part, group=tensor.device_mesh.get_group())
    return whole


def by_algorithm(named: Named) -> tuple[list[Tensor], list[Tensor]]:
    """Muon's parameters, and AdamW's."""
    assigned = assign(named)
    muon, adamw = ([a.parameter for a in assigned if a.algorithm == x] for x in ("muon", "adamw"))
    return muon, adamw


def adamw(named: Named) -> list[Optimizer]:
    return [torch.optim.AdamW([p for _, p in named], lr=3e-4, fused=True)]


def adamw8(named: Named) -> list[Optimizer]:
    return [DistMuon(named, adamw_lr=3e-4, adamw_state="dynamic8", overrides={"*": "adamw"})]


def torch_muon(named: Named) -> list[Optimizer]:
    matrices, others = by_algorithm(named)
    return [GatheredMuon(matrices, lr=5e-3), torch.optim.AdamW(others, lr=3e-4, fused=True)]


def dist_muon(state: MomentumState, wire: Wire) -> Make:
    return lambda named: [DistMuon(named, lr=5e-3, momentum_state=state, wire=wire)]


def choice(states: Iterable[MomentumState], wires: Sequence[Wire]) -> dict[str, Make]:
    """By name: the others first, then DistMuon with every state and wire."""
    ours = {f"DistMuon, {state}, {wire} wire": dist_muon(state, wire) for state in states for wire in wires}
    return {ADAMW: adamw, ADAMW8: adamw8, TORCH_MUON: torch_muon, **ours}
