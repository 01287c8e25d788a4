"""A launch for many pieces: what kernels that read the addresses of pieces from a table have in common.

Taken are pieces that divide into whole blocks and lie at multiples of 16 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from muon_dist.kernels import Encoded
from muon_dist.kernels.tiles import TILE_ELEMENTS, block_of

Key = tuple[Any, ...]

FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def common_block(plain: Tensor, *values: Encoded) -> int:
    """Elements of a block, a power of two that divides the piece and its rows; 0 if there is none."""
    rows, cols = plain.shape
    block = block_of(cols, *values)
    divides = plain.numel() % block == 0 and (rows == 1 or cols % block == 0)
    return block if divides and plain.is_contiguous() and block & (block - 1) == 0 and block <= TILE_ELEMENTS else 0


def addresses(*values: Encoded) -> tuple[int, ...]:
    """Of the elements and the scales of each."""
    return tuple(pointer.data_ptr() for value in values for pointer in value.pointers[:2])


def aligned(addresses: Sequence[int]) -> bool:
    return all(address % 16 == 0 for address in addresses)


def bits(value: float) -> int:
    """Of an fp32 number, so that it fits in the table."""
    return int.from_bytes(struct.pack("<f", value), "little", signed=True)


def table_on(device: torch.device, rows: list[list[int]], taken: Tensor | None = None) -> Tensor:
    """The table, int64, copied without waiting.

    Args:
        taken: a bool on the device, whether there is anything to do: where not, no piece has a row.
    """
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    if taken is not None:
        table[:, 0] *= taken
    return table


def grid(rows: list[list[int]], block: int) -> tuple[int, int]:
    height = TILE_ELEMENTS // block
    return -(-max(row[0] for row in rows) // height), len(rows)


def constants(block: int) -> dict[str, int]:
    return {"BLOCK": block, "ROWS": TILE_ELEMENTS // block}


@triton.jit
def pointer_in(field, FORMAT: tl.constexpr):
    """The address in a field of the table, as a pointer to elements of a format."""
    address = tl.load(field)
    if FORMAT == "linear8":
        pointer = address.to(tl.pointer_type(tl.int8))
    elif FORMAT == "dynamic8" or FORMAT == "unsigned8" or FORMAT == "block4" or FORMAT == "grid4":
        pointer = address.to(tl.pointer_type(tl.uint8))
    elif FORMAT == "bf16":
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    elif FORMAT == "fp16":
        pointer = address.to(tl.pointer_type(tl.float16))
    else:
        pointer = address.to(tl.pointer_type(tl.float32))
    return tl.multiple_of(pointer, 16)


@triton.jit
def number_in(field):
    """An fp32 number in a field of the table, as ``bits`` put it there."""
    return tl.load(field).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def tile_of_piece(tile, rows, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """A tile as ``load_tile`` takes it, a block a row: rows that are there are whole."""
    row = (tile * ROWS + tl.arange(0, ROWS))[:, None]
    is_there = row < rows
    row = row.to(tl.int64)
    inside = tl.arange(0, BLOCK)[None, :]
    mask = tl.broadcast_to(is_there, (ROWS, BLOCK))
    exists = tl.full((ROWS, BLOCK), True, tl.int1)
    half: tl.constexpr = max(1, BLOCK // 2)
    pair = row * half + tl.arange(0, half)[None, :]
    pair_mask = tl.broadcast_to(is_there, (ROWS, half))
    return (row * BLOCK + inside, mask), (pair, pair_mask), (row, is_there), exists
