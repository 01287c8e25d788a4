"""How optimizer state is stored: one file a codec, chosen by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import torch

from muon_dist.codecs.block4 import Block4
from muon_dist.codecs.dynamic8 import Dynamic8
from muon_dist.codecs.full import Full
from muon_dist.codecs.grid4 import Grid4
from muon_dist.codecs.linear8 import Linear8
from muon_dist.codecs.lowrank import Folded, LowRank, aligned_rank, rank_of
from muon_dist.codecs.protocol import BufferSpec, Codec
from muon_dist.codecs.sections import Sections
from muon_dist.layout import Extent
from muon_dist.options import DEFAULT_BLOCK_SIZE, LowRankState, MomentumState, RowWiseState

CODECS = get_args(MomentumState)
LOW_RANK_CODECS = get_args(LowRankState)
FOUR_BIT_CODECS = ("int4", "nf4", *LOW_RANK_CODECS)

# Of the shorter side of a matrix, as in the paper.
_GRASP_RANK = 1 / 16
# What lowrank4 may cost, in bytes an element: its rank is what fits. (Half a byte of codes and a 64th of scales for the
# rest leave a quarter as many elements for the factors.)
_LOWRANK_BYTES = 0.65
_LOWRANK_SHARE = 1 / 4


def make_codec(name: RowWiseState, block: int = DEFAULT_BLOCK_SIZE, *, signed: bool = True) -> Codec:
    """The row-wise codec called ``name``.

    Args:
        name: options were checked by :class:`muon_dist.options.Options`.
        block: elements that share a scale, for the codecs that have one.
        signed: False for a state that is never negative (AdamW's second moment); dynamic8 then spends no code on signs.
    """
    if name == "linear8":
        return Linear8(block)
    if name == "dynamic8":
        return Dynamic8(block, signed)
    if name == "int4" or name == "nf4":
        return Block4(block, name)
    return Full(name, torch.float32 if name == "fp32" else torch.bfloat16)


def make_low_rank_codec(name: LowRankState, block: int, extent: Extent, rank_fraction: float | None = None) -> Codec:
    """The low-rank codec called ``name``, for the parts of one matrix.

    Args:
        block: elements that share a scale, and the side of grasp4's tiles.
        rank_fraction: rank of the low-rank part over the shorter side, of a matrix in one piece. Shards have the rank
            that costs them the same number of bytes an element.
    """
    rows, cols = extent.part
    short, long = sorted(extent.matrix)
    if name == "grasp4":
        share = (rank_fraction or _GRASP_RANK) * (1 + short / long)
        factors, residual = Linear8(block), Grid4(block, rows, extent.cuts[0])
        codec = LowRank(name, rank_of(share, rows, cols), extent.cuts, factors, residual, compensated=False)
    else:
        share = rank_fraction * (1 + short / long) if rank_fraction else _LOWRANK_SHARE
        parts = Block4(block, "lloyd4")
        codec = LowRank(name, rank_of(share, rows, cols), extent.cuts, parts, parts, compensated=True)
        while rank_fraction is None and codec.rank > 1 and nbytes(codec, extent.part) > _LOWRANK_BYTES * rows * cols:
            codec = replace(codec, rank=aligned_rank(codec.rank - 1))
    return Folded(codec, cols) if extent.run else codec


def nbytes(codec: Codec, shape: Sequence[int]) -> int:
    """Bytes that a state, or a part of one, of ``shape`` is stored in."""
    return sum(spec.nbytes for spec in codec.buffers(shape).values())


__all__ = [
    "CODECS",
    "FOUR_BIT_CODECS",
    "LOW_RANK_CODECS",
    "BufferSpec",
    "Codec",
    "Sections",
    "make_codec",
    "make_low_rank_codec",
    "nbytes",
]
