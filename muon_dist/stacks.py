"""Momenta whose codec looks at whole pieces, taken several of one shape at a time: products of one do not fill a chip.

This is the accumulate phase of low-rank codecs; ``MuonParameter.accumulate`` is that of row-wise ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from muon_dist.codecs import Codec
from muon_dist.wire import WireFormat

# Elements stacked at a time: bounds each fp32 temporary at 64 MiB, unless one piece is larger.
_STACK_ELEMENTS = 1 << 24


class Member(NamedTuple):
    """One piece: its gradient [rows, cols], the momentum's buffers, and the bytes that it travels in (uint8)."""

    gradient: Tensor
    buffers: Mapping[str, Tensor]
    packed: Tensor


class AccumulateStacks:
    """Collects pieces, then accumulates them shape by shape."""

    def __init__(self, wire: WireFormat) -> None:
        self._wire = wire
        self._members: dict[tuple[Codec, torch.Size, float, bool], list[Member]] = {}

    def take(self, codec: Codec, member: Member, beta: float, nesterov: bool) -> None:
        self._members.setdefault((codec, member.gradient.shape, beta, nesterov), []).append(member)

    def launch(self) -> None:
        """Computes what was taken."""
        for (codec, shape, beta, nesterov), members in self._members.items():
            count = max(1, _STACK_ELEMENTS // shape.numel())
            for first in range(0, len(members), count):
                accumulate_pieces(codec, members[first : first + count], self._wire, beta, nesterov)


def accumulate_pieces(codec: Codec, members: Sequence[Member], wire: WireFormat, beta: float, nesterov: bool) -> None:
    """Takes gradients into momenta of one shape and packs what is to be orthogonalised."""
    g = torch.stack([member.gradient for member in members]).float()
    stacked = {name: torch.stack([m.buffers[name] for m in members]) for name in members[0].buffers}
    momentum = codec.decode(stacked, g.shape[-1]).lerp_(g, 1 - beta)
    codec.encode(momentum, stacked)
    for name, buffer in stacked.items():
        torch._foreach_copy_([member.buffers[name] for member in members], list(buffer.unbind()))
    packed = g.lerp_(momentum, beta) if nesterov else momentum
    for matrix, member in zip(packed, members, strict=True):
        wire.pack(matrix.unsqueeze(0), member.packed.unsqueeze(0))
