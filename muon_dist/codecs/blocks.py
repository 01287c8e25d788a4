"""Row blocks: each row of a matrix cut into runs of ``block`` elements with one scale each, the last one short.

Codecs of row blocks say how a block is stored, in plain torch; where kernels can, they encode and decode in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from muon_dist import kernels
from muon_dist.codecs.protocol import RowWise
from muon_dist.kernels import Encoded

if kernels.HAS_TRITON:
    from muon_dist.kernels import recode

# The scales are bf16: the range of fp32 in two bytes, so that a block of 128 costs what a block of 256 costs with
# fp32 scales, at a smaller error. Rounding to nearest moves a scale by at most 2^-8 of itself, less than half a step
# of linear8: the largest element of a block still gets the outermost code, and encoding what was decoded finds the
# same scale again.
SCALE_DTYPE = torch.bfloat16

# A block whose largest magnitude is below this is stored as zeros: 1 / scale would overflow soon after.
SMALLEST_SCALE = 2.0**-100


def block_count(cols: int, block: int) -> int:
    """Blocks in a row."""
    return math.ceil(cols / block)


def to_blocks(values: Tensor, block: int) -> Tensor:
    """``[..., cols]`` as ``[..., blocks, block]``, rows padded with zeros; a view where none is needed."""
    cols = values.shape[-1]
    count = block_count(cols, block)
    padded = functional.pad(values, (0, count * block - cols)) if cols % block else values
    return padded.view(*values.shape[:-1], count, block)


def from_blocks(blocks: Tensor, cols: int) -> Tensor:
    """The inverse of :func:`to_blocks`: ``[..., blocks, block]`` back to ``[..., cols]``."""
    return blocks.flatten(-2)[..., :cols]


def reciprocal(scales: Tensor) -> Tensor:
    """1 / ``scales`` in fp32, and 0 for those of blocks that are stored as zeros. NaN stays NaN."""
    wide = scales.float()
    return torch.where(wide.abs() < SMALLEST_SCALE, 0.0, wide.reciprocal())


@dataclass(frozen=True)
class BlockCodec(RowWise):
    """What codecs of row blocks have in common: "codes" and "scales".

    Attributes:
        block: elements of a row that share a scale.
    """

    block: int

    def for_kernels(self, buffers: Mapping[str, Tensor]) -> Encoded:
        raise NotImplementedError

    def encode(self, values: Tensor, buffers: Mapping[str, Tensor]) -> None:
        if (stored := self._for_recode(buffers, values.shape[-1])) is not None:
            beside = values if values.stride(-1) == 1 else values.contiguous()
            recode.encode(beside.reshape(*stored.shape, values.shape[-1]), stored)
        else:
            self._encode(values.float().contiguous(), buffers)

    def decode(self, buffers: Mapping[str, Tensor], cols: int, out: Tensor | None = None) -> Tensor:
        codes = buffers["codes"]
        if (stored := self._for_recode(buffers, cols)) is not None:
            if out is None:
                out = torch.empty((*codes.shape[:-1], cols), dtype=torch.float32, device=codes.device)
            recode.decode(stored, out.view(*stored.shape, cols))
            return out
        values = self._decode(buffers, cols)
        return values if out is None else out.copy_(values)

    def _encode(self, values: Tensor, buffers: Mapping[str, Tensor]) -> None:
        """``encode`` in plain torch; ``values`` are contiguous."""
        raise NotImplementedError

    def _decode(self, buffers: Mapping[str, Tensor], cols: int) -> Tensor:
        """``decode`` in plain torch, into new memory."""
        raise NotImplementedError

    def _for_recode(self, buffers: Mapping[str, Tensor], cols: int) -> Encoded | None:
        """What is stored as kernels take it, ``[n, m, rows, ...]``; None where there are none for it."""
        codes = buffers["codes"]
        if not kernels.usable_on(codes.device) or not codes.numel():
            return None
        if all(buffer.is_contiguous() for buffer in buffers.values()):
            buffers = {key: buffer.view(1, 1, -1, buffer.shape[-1]) for key, buffer in buffers.items()}
        elif codes.ndim == 3:
            buffers = {key: buffer[:, None] for key, buffer in buffers.items()}
        elif codes.ndim != 4:
            return None
        if not all(buffer[0, 0].is_contiguous() for buffer in buffers.values()):
            return None
        stored = self.for_kernels(buffers)
        return stored if kernels.fit((*stored.shape[2:], cols), stored) else None
