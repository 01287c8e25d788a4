"""Momenta whose codec looks at whole pieces, taken several of one shape at a time: products of one do not fill a chip.

This is the accumulate phase of low-rank codecs; ``MuonMatrix.accumulate`` is that of row-wise ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from muon_dist import kernels
from muon_dist.codecs import Codec
from muon_dist.codecs.lowrank import Folded, LowRank
from muon_dist.wire import WireFormat

if kernels.HAS_TRITON:
    from muon_dist.kernels.lowrank import Pieces

# Elements stacked at a time: in bf16, as kernels have them, each temporary is 128 MiB at most, or one piece.
_STACK_ELEMENTS = 1 << 26


class Member(NamedTuple):
    """One piece: its gradient [rows, cols], the momentum's buffers, and the bytes that it travels in (uint8)."""

    gradient: Tensor
    buffers: Mapping[str, Tensor]
    packed: Tensor


class AccumulateStacks:
    """Collects pieces, then accumulates them shape by shape."""

    def __init__(self, wire: WireFormat, taken: Tensor | None) -> None:
        self._wire = wire
        self._taken = taken
        self._members: dict[tuple[Codec, torch.Size, float, bool], list[Member]] = {}

    def take(self, codec: Codec, member: Member, beta: float, nesterov: bool) -> None:
        self._members.setdefault((codec, member.gradient.shape, beta, nesterov), []).append(member)

    def launch(self) -> None:
        """Computes what was taken."""
        for (codec, shape, beta, nesterov), members in self._members.items():
            count = max(1, _STACK_ELEMENTS // shape.numel())
            for first in range(0, len(members), count):
                accumulate_pieces(codec, members[first : first + count], self._wire, beta, nesterov, self._taken)


def accumulate_pieces(
    codec: Codec,
    members: Sequence[Member],
    wire: WireFormat,
    beta: float,
    nesterov: bool,
    taken: Tensor | None = None,
) -> None:
    """Takes gradients into momenta of one shape and packs what is to be orthogonalised.

    Args:
        taken: a bool on the device, whether the momenta change; None: they do.
    """
    if kernels.usable_on(members[0].packed.device) and _accumulate_fused(codec, members, wire, beta, nesterov, taken):
        return
    g = torch.stack([member.gradient for member in members]).float()
    stacked = _stacked(members)
    momentum = codec.decode(stacked, g.shape[-1]).lerp_(g, 1 - beta)
    codec.encode(momentum, stacked)
    _put_back(stacked, members, taken)
    packed = g.lerp_(momentum, beta) if nesterov else momentum
    for matrix, member in zip(packed, members, strict=True):
        wire.pack(matrix.unsqueeze(0), member.packed.unsqueeze(0))


def _accumulate_fused(
    codec: Codec, members: Sequence[Member], wire: WireFormat, beta: float, nesterov: bool, taken: Tensor | None
) -> bool:
    """The same by kernels, for low-rank codecs whose rest they know; whether they took it."""
    shape = members[0].gradient.shape
    gradients = [member.gradient for member in members]
    if isinstance(codec, Folded) and shape.numel() % codec.width == 0:
        gradients = [gradient.view(-1, codec.width) for gradient in gradients]
        codec = codec.codec
    if not isinstance(codec, LowRank):
        return False
    rests = [codec.residual.for_kernels(member.buffers) for member in members]
    pieces = Pieces.of(gradients, rests, [wire.for_kernels(member.packed, *shape) for member in members], taken)
    if pieces is None:
        return False
    factors = _stacked(members, codec.factor_buffers)
    left, right = codec.decode_factors(factors, gradients[0].shape[-1])
    momentum = pieces.accumulate(left @ right, beta, nesterov)
    pieces.store(momentum, codec.follow(momentum, right, factors))
    _put_back(factors, members, taken)
    return True


def _stacked(members: Sequence[Member], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The members' buffers of these names, or all, one member behind the other, where their gradients are."""
    device = members[0].gradient.device
    return {
        name: torch.stack([m.buffers[name].to(device, non_blocking=True) for m in members])
        for name in names or members[0].buffers
    }


def _put_back(stacked: Mapping[str, Tensor], members: Sequence[Member], taken: Tensor | None) -> None:
    if taken is not None:
        stacked = {name: torch.where(taken, stacked[name], old) for name, old in _stacked(members, stacked).items()}
    for name, buffer in stacked.items():  # page-locked ones are not waited for here
        torch._foreach_copy_([member.buffers[name] for member in members], list(buffer.unbind()), non_blocking=True)
