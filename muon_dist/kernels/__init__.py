"""Triton kernels: each does in one pass over memory what its caller's plain-torch reference does in several.

A leaf: kernels know tensors and the names of formats, nothing else of the package. Used on CUDA where triton is
installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None


def usable_on(device: torch.device) -> bool:
    """Whether tensors on ``device`` go through kernels."""
    return HAS_TRITON and device.type == "cuda"


def reader_of(tensor: Tensor) -> torch.device:
    """The device whose kernels address a tensor: its own, or for page-locked memory of the host the current one."""
    return torch.device("cuda", torch.cuda.current_device()) if tensor.is_pinned() else tensor.device


# Of 4-bit maps' search tables: cells of equal width, from -1.14 to 1.14, narrower than the distance of any two borders.
CELLS, CELLS_PER_UNIT = 32, 14


class Tables(NamedTuple):
    """A map of levels.

    Attributes:
        levels: fp32, ascending.
        borders: fp32, one less: an element has as its code the number of borders below it.
        search: the borders as kernels look them up; ``kernels/block4.py`` and ``kernels/dynamic8.py`` say how.
    """

    levels: Tensor
    borders: Tensor
    search: Tensor


class Encoded(NamedTuple):
    """fp32 values [rows, cols] in one of the formats, as kernels take them.

    Attributes:
        format: "fp32", "bf16", "fp16", "linear8", "dynamic8", "unsigned8" (dynamic8 of what is not negative), or
            "block4" and "grid4", whose codes take half a byte.
        buffers: contiguous; elements under "" or "codes", and "scales"; grid4 has "row_scales" and "col_scales".
        block: elements of a row that share a scale; None for formats without scales.
        tables: of formats whose codes are looked up.
    """

    format: str
    buffers: Mapping[str, Tensor]
    block: int | None = None
    tables: Tables | None = None

    @property
    def pointers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Elements, scales, levels and search; the elements stand in for what the format does not have."""
        elements = self.buffers["codes"] if "codes" in self.buffers else self.buffers[""]
        scales = self.buffers.get("scales", self.buffers.get("row_scales", elements))
        return elements, scales, *look_ups(self.tables, elements)

    @property
    def shape(self) -> torch.Size:
        """Of the buffers, but for columns."""
        return self.pointers[0].shape[:-1]

    @property
    def of_columns(self) -> Tensor:
        """The scales of columns; the elements stand in for them in formats without."""
        return self.buffers.get("col_scales", self.pointers[0])


def tables_of(*values: Encoded) -> Tables | None:
    """Of the one map among ``values`` that fit, if there is one."""
    return next((v.tables for v in values if v.tables is not None), None)


def look_ups(tables: Tables | None, stand_in: Tensor) -> tuple[Tensor, Tensor]:
    """Levels and search, as kernels take them; any tensor stands in where there are none."""
    return (tables.levels, tables.search) if tables is not None else (stand_in, stand_in)


def fit(shape: Sequence[int], *values: Encoded) -> bool:
    """Whether kernels can take ``values``, each of ``shape``, [rows, cols], at once: a tile is a block of all of them,
    two codes that share a byte lie in one tile, and there is one map at most."""
    rows, cols = shape
    blocks = {min(v.block, cols) for v in values if v.block is not None}
    maps = {id(v.tables) for v in values if v.tables is not None}
    paired = any(v.format in ("block4", "grid4") for v in values)
    fits_pairs = all(block % 2 == 0 for block in blocks) and (rows == 1 or cols % 2 == 0)
    return len(blocks) <= 1 and len(maps) <= 1 and (fits_pairs or not paired)


class Product(NamedTuple):
    """alpha A B^T + beta D + gamma E + diagonal I.

    Attributes:
        a, b: slots of the factors; None for X, which is then both.
        out: slot of the result, which is none of the others.
        add, also: slots of D and E; None for none.
        a_rest: slot of what rounding took off A, which is then multiplied too.
        rest: slot for what rounding takes off the result, where that is to be kept. If such a product is symmetric, it
            adds nothing; if not, it adds D, which may lie in this slot. X X^T then uses the last two slots, too.
        is_symmetric: whether the result is, so that half of it need not be computed.
        keeps_diagonal: whether each row is multiplied by what makes its diagonal element a number that the dtype has.
            Such a product adds nothing, and is not symmetric.
    """

    a: int | None
    b: int | None
    out: int
    add: int | None = None
    also: int | None = None
    alpha: float = 1.0
    beta: float = 0.0
    gamma: float = 0.0
    diagonal: float = 0.0
    a_rest: int | None = None
    rest: int | None = None
    is_symmetric: bool = True
    keeps_diagonal: bool = False

    @property
    def terms(self) -> list[tuple[int | None, int | None]]:
        """The factors of what is summed up, one term or two."""
        first = (self.a, self.b)
        return [first] if self.a_rest is None else [first, (self.a_rest, self.b)]


class Chain(NamedTuple):
    """Products to be made in order.

    Attributes:
        slots: square matrices to keep at a time.
        result: the slot in which Q ends.
    """

    products: tuple[Product, ...]
    slots: int
    result: int


# Rows of a tile of ``chain.py``, and columns of X that it takes at a time.
CHAIN_TILE, CHAIN_DEPTH = 128, 64
# Smaller Gram matrices were not measured.
_SMALLEST_OF_CHAINS = 512


def chain_takes(s: int, k: int, dtype: torch.dtype) -> bool:
    """Whether a chain from matrices [s, k] is one launch where ``chain.py`` runs: half precision, whole tiles."""
    is_half = dtype in (torch.float16, torch.bfloat16)
    return is_half and s >= _SMALLEST_OF_CHAINS and s % CHAIN_TILE == k % CHAIN_DEPTH == 0
