"""linear8: int8 codes, evenly spaced between plus and minus the largest magnitude of each row block.

Source: "Effective Quantization of Muon Optimizer States", arXiv 2509.23106 (blockwise linear 8-bit momentum, blocks
of 2048). Our blocks are shorter and lie inside a row, so that any cut between rows is a cut between blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muon_dist.codecs.blocks import (
    SCALE_DTYPE,
    SMALLEST_SCALE,
    BlockCodec,
    block_count,
    from_blocks,
    reciprocal,
    to_blocks,
)
from muon_dist.codecs.protocol import BufferSpec
from muon_dist.kernels import Encoded

_LEVELS = 127.0


@dataclass(frozen=True)
class Linear8(BlockCodec):
    """1 byte an element and 2 bytes a block. An element is off by at most half a step: 1/254 of its block's scale, the
    block's largest magnitude rounded to bf16."""

    name: str = "linear8"

    def buffers(self, shape: Sequence[int]) -> dict[str, BufferSpec]:
        return {
            "codes": BufferSpec(tuple(shape), torch.int8),
            "scales": BufferSpec((*shape[:-1], block_count(shape[-1], self.block)), SCALE_DTYPE),
        }

    def for_kernels(self, buffers: Mapping[str, Tensor]) -> Encoded:
        return Encoded(self.name, buffers, self.block)

    def _encode(self, values: Tensor, buffers: Mapping[str, Tensor]) -> None:
        blocks = to_blocks(values, self.block)  # [..., blocks, block]
        largest = blocks.abs().amax(-1)
        scales = torch.where(largest < SMALLEST_SCALE, 0.0, largest).to(SCALE_DTYPE)  # [..., blocks]
        steps = (blocks * (reciprocal(scales) * _LEVELS).unsqueeze(-1)).round_().clamp_(-_LEVELS, _LEVELS)
        buffers["scales"].copy_(scales)
        buffers["codes"].copy_(from_blocks(steps, values.shape[-1]))

    def _decode(self, buffers: Mapping[str, Tensor], cols: int) -> Tensor:
        codes, scales = buffers["codes"], buffers["scales"]
        # Times the fp32 nearest to 1/127 first: 127 of it is exactly 1, so the largest element decodes to the scale
        # itself.
        fractions = to_blocks(codes, self.block).float().mul_(1 / _LEVELS)
        return from_blocks(fractions.mul_(scales.float().unsqueeze(-1)), cols).contiguous()
