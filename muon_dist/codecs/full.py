"""fp32 and bf16: the state as it is, in one buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muon_dist.codecs.protocol import BufferSpec, RowWise
from muon_dist.kernels import Encoded


@dataclass(frozen=True)
class Full(RowWise):
    """Stores each element in a floating-point dtype: 4 bytes an element for fp32, 2 for bf16."""

    name: str
    dtype: torch.dtype

    def buffers(self, shape: Sequence[int]) -> dict[str, BufferSpec]:
        return {"": BufferSpec(tuple(shape), self.dtype)}

    def for_kernels(self, buffers: Mapping[str, Tensor]) -> Encoded:
        return Encoded(self.name, buffers)

    def encode(self, values: Tensor, buffers: Mapping[str, Tensor]) -> None:
        buffers[""].copy_(values)

    def decode(self, buffers: Mapping[str, Tensor], cols: int, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty(buffers[""].shape, dtype=torch.float32, device=buffers[""].device)
        return out.copy_(buffers[""])
