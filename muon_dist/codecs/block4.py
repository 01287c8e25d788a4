"""4-bit codes, two a byte, for row blocks: int4 and nf4, and the map that lowrank4 is made of.

Each element is stored as the nearest of 16 levels, relative to the largest magnitude of its row block. Sources of the
maps:

- int4: evenly spaced, as 4-bit-Muon-GRASP's (ICLR 2026, OpenReview g2l9bg9DWx) baseline.
- nf4: Dettmers et al., "QLoRA", arXiv 2305.14314: equally likely levels of a normal distribution.
- lloyd4: least squares (Lloyd, "Least Squares Quantization in PCM", 1982) for blocks of 128, fitted to the factors
  and residuals of momenta of an 85M Llama after some 300 steps. Its outermost level is less than one, so each encoding
  shrinks a block's largest element by 7%: it is for parts of codecs that make up for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

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
from muon_dist.kernels import CELLS, CELLS_PER_UNIT, Encoded, Tables, reader_of

Map = Literal["int4", "nf4", "lloyd4"]

_NF4_NEGATIVE = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0)
_NF4_POSITIVE = (0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)
_LLOYD4 = (0.0380, 0.1175, 0.2041, 0.3005, 0.4112, 0.5427, 0.7070, 0.9335)
LEVELS: dict[Map, tuple[float, ...]] = {
    "int4": tuple(step / 7 for step in range(-8, 8)),  # no element is as low as the first
    "nf4": _NF4_NEGATIVE + _NF4_POSITIVE,
    "lloyd4": tuple(-level for level in reversed(_LLOYD4)) + _LLOYD4,
}


@dataclass(frozen=True)
class Block4(BlockCodec):
    """Half a byte an element, rows rounded up to a whole byte, and 2 bytes a block."""

    name: Map

    def buffers(self, shape: Sequence[int]) -> dict[str, BufferSpec]:
        return {
            "codes": BufferSpec((*shape[:-1], packed_cols(shape[-1])), torch.uint8),
            "scales": BufferSpec((*shape[:-1], block_count(shape[-1], self.block)), SCALE_DTYPE),
        }

    def for_kernels(self, buffers: Mapping[str, Tensor]) -> Encoded:
        return Encoded("block4", buffers, self.block, tables_on(reader_of(buffers["codes"]), self.name))

    def _encode(self, values: Tensor, buffers: Mapping[str, Tensor]) -> None:
        blocks = to_blocks(values, self.block)  # [..., blocks, block]
        largest = blocks.abs().amax(-1)
        scales = torch.where(largest < SMALLEST_SCALE, 0.0, largest).to(SCALE_DTYPE)  # [..., blocks]
        codes = nearest(blocks * reciprocal(scales).unsqueeze(-1), self.name)
        buffers["scales"].copy_(scales)
        buffers["codes"].copy_(pack(from_blocks(codes, values.shape[-1])))

    def _decode(self, buffers: Mapping[str, Tensor], cols: int) -> Tensor:
        codes, scales = buffers["codes"], buffers["scales"]
        fractions = to_blocks(tables_on(codes.device, self.name).levels[unpack(codes, cols)], self.block)
        return from_blocks(fractions * scales.float().unsqueeze(-1), cols).contiguous()


def packed_cols(cols: int) -> int:
    """Bytes of a row of 4-bit codes."""
    return (cols + 1) // 2


def pack(codes: Tensor) -> Tensor:
    """Integers below 16, ``[..., cols]``, as bytes ``[..., packed_cols(cols)]``; of each pair the first is the low
    half, and the high half is empty where there is no second."""
    pairs = functional.pad(codes, (0, codes.shape[-1] % 2)).to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def unpack(codes: Tensor, cols: int) -> Tensor:
    """The inverse of :func:`pack`, int32."""
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)[..., :cols].int()


def nearest(fractions: Tensor, name: Map) -> Tensor:
    """The codes of the levels nearest to ``fractions``, int32. NaN has one too: it is the scale that shows it."""
    return torch.bucketize(fractions, tables_on(fractions.device, name).borders, out_int32=True)


@lru_cache(maxsize=32)
def tables_on(device: torch.device, name: Map) -> Tables:
    """The levels of a map, ascending, and the borders half-way between neighbours, on ``device``."""
    levels = torch.tensor(LEVELS[name], dtype=torch.float64)
    borders = ((levels[:-1] + levels[1:]) / 2).float()
    return Tables(levels.float().to(device), borders.to(device), _cells(borders).to(device))


def _cells(borders: Tensor) -> Tensor:
    """What ``kernels/block4.py`` looks up, int64 [32]: of each cell, the border in it (fp32, infinite where there is
    none) in the low half, and the number of borders before the cell in the high half."""
    # Kernels tell eighths of a cell apart, and round to them.
    cell_of_border = (borders.double() * CELLS_PER_UNIT + CELLS / 2 + 1 / 16).floor().long()
    border = torch.full((CELLS,), math.inf).scatter(0, cell_of_border, borders)
    before = (cell_of_border < torch.arange(CELLS).unsqueeze(1)).sum(1)
    return before << 32 | border.view(torch.int32).long() & 0xFFFFFFFF
