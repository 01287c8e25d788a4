"""accumulate and apply for many pieces in one launch: a launch costs the host more than a small piece the device.

Pieces are collected, then each launch reads their addresses from a table. Taken are those that divide into whole blocks
and lie at multiples of 16 bytes; the others go through ``kernels/momentum.py`` one by one, which computes the same.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from muon_dist.kernels import Encoded, map_of
from muon_dist.kernels.tiles import TILE_ELEMENTS, block_of, load_tile, store_tile

_Key = tuple[Any, ...]


class AccumulateBatch:
    """Collects pieces for ``momentum.accumulate``."""

    def __init__(self) -> None:
        self._pieces: dict[_Key, list[list[int]]] = {}
        self._maps: dict[_Key, tuple[Tensor, Tensor, Tensor]] = {}

    def take(self, gradient: Tensor, momentum: Encoded, packed: Encoded, beta: float, nesterov: bool) -> bool:
        """Whether the piece is taken; arguments are those of ``momentum.accumulate``."""
        block = _block(gradient, momentum, packed)
        row = [gradient.numel() // block if block else 0, *_addresses(gradient, momentum, packed)]
        if not block or not _aligned(row[1:]):
            return False
        key = (gradient.device, gradient.dtype, momentum.format, packed.format, block, beta, nesterov)
        self._pieces.setdefault(key, []).append(row)
        self._maps[key] = map_of(momentum, packed)
        return True

    def launch(self) -> None:
        """Computes what was taken."""
        for key, rows in self._pieces.items():
            device, dtype, momentum, packed, block, beta, nesterov = key
            _accumulate[_grid(rows, block)](
                _on(device, rows),
                *self._maps[key],
                1 - beta,
                GRADIENT=_FORMATS[dtype],
                MOMENTUM=momentum,
                PACKED=packed,
                NESTEROV=nesterov,
                FIELDS=len(rows[0]),
                **_constants(block),
            )


class ApplyBatch:
    """Collects pieces for ``momentum.apply``."""

    def __init__(self) -> None:
        self._pieces: dict[_Key, list[list[int]]] = {}
        self._levels: dict[_Key, Tensor] = {}

    def take(self, weight: Tensor, update: Encoded, decay: float, factor: float) -> bool:
        """Whether the piece is taken; arguments are those of ``momentum.apply``."""
        block = _block(weight, update)
        row = [weight.numel() // block if block else 0, *_addresses(weight, update), _bits(decay), _bits(factor)]
        if not block or not _aligned(row[1:-2]):
            return False
        key = (weight.device, weight.dtype, update.format, block)
        self._pieces.setdefault(key, []).append(row)
        self._levels[key] = update.pointers[2]
        return True

    def launch(self) -> None:
        """Computes what was taken."""
        for key, rows in self._pieces.items():
            device, dtype, update, block = key
            _apply[_grid(rows, block)](
                _on(device, rows),
                self._levels[key],
                WEIGHT=_FORMATS[dtype],
                UPDATE=update,
                FIELDS=len(rows[0]),
                **_constants(block),
            )


_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _block(plain: Tensor, *values: Encoded) -> int:
    """Elements of a block, a power of two that divides the piece and its rows; 0 if there is none."""
    rows, cols = plain.shape
    block = block_of(cols, *values)
    divides = plain.numel() % block == 0 and (rows == 1 or cols % block == 0)
    return block if divides and plain.is_contiguous() and block & (block - 1) == 0 and block <= TILE_ELEMENTS else 0


def _addresses(plain: Tensor, *values: Encoded) -> list[int]:
    return [plain.data_ptr(), *(pointer.data_ptr() for value in values for pointer in value.pointers[:2])]


def _aligned(addresses: list[int]) -> bool:
    return all(address % 16 == 0 for address in addresses)


def _bits(value: float) -> int:
    """Of an fp32 number, so that it fits in the table."""
    return int.from_bytes(struct.pack("<f", value), "little", signed=True)


def _on(device: torch.device, rows: list[list[int]]) -> Tensor:
    """The table, int64, copied without waiting."""
    return torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _grid(rows: list[list[int]], block: int) -> tuple[int, int]:
    height = TILE_ELEMENTS // block
    return -(-max(row[0] for row in rows) // height), len(rows)


def _constants(block: int) -> dict[str, int]:
    return {"BLOCK": block, "ROWS": TILE_ELEMENTS // block}


@triton.jit
def _pointer(field, FORMAT: tl.constexpr):
    """The address in a field of the table, as a pointer to elements of a format."""
    address = tl.load(field)
    if FORMAT == "linear8":
        pointer = address.to(tl.pointer_type(tl.int8))
    elif FORMAT == "dynamic8" or FORMAT == "block4":
        pointer = address.to(tl.pointer_type(tl.uint8))
    elif FORMAT == "bf16":
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    elif FORMAT == "fp16":
        pointer = address.to(tl.pointer_type(tl.float16))
    else:
        pointer = address.to(tl.pointer_type(tl.float32))
    return tl.multiple_of(pointer, 16)


@triton.jit
def _tile(rows, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Places [ROWS, BLOCK] and rows [ROWS, 1] of this program's tile, a block a row, with their masks."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    inside = tl.arange(0, BLOCK)[None, :]
    return row * BLOCK + inside, (row < rows) & (inside < BLOCK), row, row < rows


@triton.jit
def _accumulate(
    table,
    levels,
    borders,
    starts,
    weight,
    GRADIENT: tl.constexpr,
    MOMENTUM: tl.constexpr,
    PACKED: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    fields = table + tl.program_id(1) * FIELDS
    rows = tl.load(fields)
    if tl.program_id(0) * ROWS < rows:
        gradient = _pointer(fields + 1, GRADIENT)
        elements = _pointer(fields + 2, MOMENTUM)
        scales = _pointer(fields + 3, "bf16")
        packed = _pointer(fields + 4, PACKED)
        packed_scales = _pointer(fields + 5, "bf16")
        place, mask, row, row_mask = _tile(rows, BLOCK, ROWS)
        g = tl.load(gradient + place, mask=mask, other=0).to(tl.float32)
        m = load_tile(elements, scales, levels, place, mask, row, row_mask, MOMENTUM)
        m += weight * (g - m)
        store_tile(m, elements, scales, borders, starts, place, mask, row, row_mask, MOMENTUM)
        if NESTEROV:
            m -= weight * (m - g)
        store_tile(m, packed, packed_scales, borders, starts, place, mask, row, row_mask, PACKED)


@triton.jit
def _apply(
    table,
    levels,
    WEIGHT: tl.constexpr,
    UPDATE: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    fields = table + tl.program_id(1) * FIELDS
    rows = tl.load(fields)
    if tl.program_id(0) * ROWS < rows:
        weight = _pointer(fields + 1, WEIGHT)
        elements = _pointer(fields + 2, UPDATE)
        scales = _pointer(fields + 3, "bf16")
        decay = tl.load(fields + 4).to(tl.int32).to(tl.float32, bitcast=True)
        factor = tl.load(fields + 5).to(tl.int32).to(tl.float32, bitcast=True)
        place, mask, row, row_mask = _tile(rows, BLOCK, ROWS)
        u = load_tile(elements, scales, levels, place, mask, row, row_mask, UPDATE)
        w = tl.load(weight + place, mask=mask, other=0).to(tl.float32)
        tl.store(weight + place, w * decay + factor * u, mask=mask)
