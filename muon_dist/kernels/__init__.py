"""Triton kernels: each does in one pass over memory what its caller's plain-torch reference does in several.

A leaf: kernels know tensors and the names of formats, nothing else of the package. Used on CUDA where triton is
installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None


def usable_on(device: torch.device) -> bool:
    """Whether tensors on ``device`` go through kernels."""
    return HAS_TRITON and device.type == "cuda"


# Cells of the line: fp32 numbers of one sign that share their exponent and first seven digits, from 2^-23 to 2.
CELL_SHIFT = 23 - 7
FIRST_CELL = (127 - 23) << 7
CELLS = 24 << 7


class Tables(NamedTuple):
    """A map of 256 levels.

    Attributes:
        levels: fp32, ascending.
        borders: fp32, 255: an element has as its code the number of borders below it.
        starts: uint8, 2 CELLS: the number of borders below each cell, those of positive numbers first. No cell has more
            than one border in it, so a code is found by one look-up and one comparison.
    """

    levels: Tensor
    borders: Tensor
    starts: Tensor


class Encoded(NamedTuple):
    """fp32 values [rows, cols] in one of the formats, as kernels take them.

    Attributes:
        format: "fp32", "bf16", "fp16", "linear8" or "dynamic8".
        buffers: contiguous; elements under "" or "codes", and "scales".
        block: elements of a row that share a scale; None for formats without scales.
        tables: of dynamic8.
    """

    format: str
    buffers: Mapping[str, Tensor]
    block: int | None = None
    tables: Tables | None = None

    @property
    def pointers(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Elements, scales, levels, borders and starts; the elements stand in for what the format does not have."""
        elements = self.buffers["codes"] if "codes" in self.buffers else self.buffers[""]
        tables = self.tables or (elements, elements, elements)
        return elements, self.buffers.get("scales", elements), *tables


def blocks_agree(cols: int, *values: Encoded) -> bool:
    """Whether one tile can be a block of all of ``values`` at once, in rows of ``cols`` elements."""
    return len({min(v.block, cols) for v in values if v.block is not None}) <= 1
