"""How optimizer state is stored: one file a codec, chosen by name."""

from __future__ import annotations

from typing import get_args

import torch

from muon_dist.codecs.dynamic8 import Dynamic8
from muon_dist.codecs.full import Full
from muon_dist.codecs.linear8 import Linear8
from muon_dist.codecs.protocol import BufferSpec, Codec
from muon_dist.options import DEFAULT_BLOCK_SIZE, MomentumState

CODECS = get_args(MomentumState)


def make_codec(name: MomentumState, block: int = DEFAULT_BLOCK_SIZE, *, signed: bool = True) -> Codec:
    """The codec called ``name``.

    Args:
        name: one of ``CODECS``; options were checked by :class:`muon_dist.options.Options`.
        block: elements that share a scale, for the 8-bit codecs.
        signed: False for a state that is never negative (AdamW's second moment); dynamic8 then spends no code on signs.
    """
    if name == "linear8":
        return Linear8(block)
    if name == "dynamic8":
        return Dynamic8(block, signed)
    return Full(name, torch.float32 if name == "fp32" else torch.bfloat16)


__all__ = ["CODECS", "BufferSpec", "Codec", "make_codec"]
