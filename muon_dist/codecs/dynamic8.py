"""dynamic8: 8-bit codes on a dynamic-tree map, finer near zero, scaled by each row block's largest element.

Source of the map: Dettmers, "8-bit Approximations for Parallelism in Deep Learning", arXiv 1511.04561, and Dettmers
et al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861; the levels are those of bitsandbytes'
``create_dynamic_map(signed, max_exponent_bits=7, total_bits=8)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

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
from muon_dist.kernels import Encoded, Tables, reader_of


@dataclass(frozen=True)
class Dynamic8(BlockCodec):
    """1 byte an element and 2 bytes a block.

    The signed map has +1 but not -1, so the scale is the block's largest element with its sign. Codes are of fractions
    of that element, not of the scale it is rounded to: it always decodes to the scale itself, and encoding what was
    decoded changes nothing.
    """

    signed: bool = True
    name: str = "dynamic8"

    def buffers(self, shape: Sequence[int]) -> dict[str, BufferSpec]:
        return {
            "codes": BufferSpec(tuple(shape), torch.uint8),
            "scales": BufferSpec((*shape[:-1], block_count(shape[-1], self.block)), SCALE_DTYPE),
        }

    def for_kernels(self, buffers: Mapping[str, Tensor]) -> Encoded:
        name = "dynamic8" if self.signed else "unsigned8"
        return Encoded(name, buffers, self.block, _map_on(reader_of(buffers["codes"]), self.signed))

    def _encode(self, values: Tensor, buffers: Mapping[str, Tensor]) -> None:
        blocks = to_blocks(values, self.block)  # [..., blocks, block]
        high, low = blocks.amax(-1), blocks.amin(-1)
        largest = torch.where(high >= -low, high, low)
        largest = torch.where(largest.abs() < SMALLEST_SCALE, 0.0, largest)  # [..., blocks]
        fractions = blocks * reciprocal(largest).unsqueeze(-1)
        codes = torch.bucketize(fractions, _map_on(values.device, self.signed).borders, out_int32=True)
        buffers["scales"].copy_(largest)
        buffers["codes"].copy_(from_blocks(codes, values.shape[-1]))

    def _decode(self, buffers: Mapping[str, Tensor], cols: int) -> Tensor:
        codes, scales = buffers["codes"], buffers["scales"]
        fractions = _map_on(codes.device, self.signed).levels[to_blocks(codes, self.block).int()]
        return from_blocks(fractions.mul_(scales.float().unsqueeze(-1)), cols).contiguous()


def dynamic_map(signed: bool) -> list[float]:
    """The 256 levels, ascending, from -0.993 (signed) or 0 (unsigned) to 1.

    Decade ``i`` of seven, counted from the smallest, spans [0.1, 1] * 10^(i - 6) and holds 2^i levels a sign (2^(i+1)
    when unsigned): the midpoints of equal intervals. Zero and one complete the map.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        intervals = 2 ** (decade if signed else decade + 1)
        width = 0.9 / intervals
        midpoints = [10.0 ** (decade - 6) * (0.1 + width * (k + 0.5)) for k in range(intervals)]
        levels += midpoints
        if signed:
            levels += [-level for level in midpoints]
    return sorted(levels)


@lru_cache(maxsize=32)
def _map_on(device: torch.device, signed: bool) -> Tables:
    """The levels, and the borders half-way between neighbours, on ``device``."""
    levels = torch.tensor(dynamic_map(signed), dtype=torch.float64)
    borders = ((levels[:-1] + levels[1:]) / 2).float()
    above = functional.pad(torch.nextafter(borders, torch.tensor(math.inf)), (1, 0), value=-math.inf)
    return Tables(levels.float().to(device), borders.to(device), above.to(device))
