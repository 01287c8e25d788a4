"""accumulate and apply for many pieces in one launch: a launch costs the host more than a small piece the device.

Pieces are collected, then each launch reads their addresses from a table. Those that ``kernels/table.py`` cannot take
go through ``kernels/momentum.py`` one by one, which computes the same.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from muon_dist.kernels import Encoded, map_of
from muon_dist.kernels.table import (
    FORMATS,
    Key,
    addresses,
    aligned,
    bits,
    common_block,
    constants,
    grid,
    number_in,
    pointer_in,
    table_on,
    tile_of_piece,
)
from muon_dist.kernels.tiles import load_tile, store_tile


class AccumulateBatch:
    """Collects pieces for ``momentum.accumulate``; ``taken`` as for ``table_on``."""

    def __init__(self, taken: Tensor | None = None) -> None:
        self._taken = taken
        self._pieces: dict[Key, list[list[int]]] = {}
        self._gradients: list[Tensor] = []  # one may be a copy that nobody else keeps until the launch
        self._maps: dict[Key, tuple[Tensor, Tensor, Tensor]] = {}

    def take(self, gradient: Tensor, momentum: Encoded, packed: Encoded, beta: float, nesterov: bool) -> bool:
        """Whether the piece is taken; arguments are those of ``momentum.accumulate``."""
        block = common_block(gradient, momentum, packed)
        row = [gradient.numel() // block if block else 0, *addresses(gradient, momentum, packed)]
        if not block or not aligned(row[1:]):
            return False
        key = (gradient.device, gradient.dtype, momentum.format, packed.format, block, beta, nesterov)
        self._pieces.setdefault(key, []).append(row)
        self._gradients.append(gradient)
        self._maps[key] = map_of(momentum, packed)
        return True

    def launch(self) -> None:
        """Computes what was taken."""
        for key, rows in self._pieces.items():
            device, dtype, momentum, packed, block, beta, nesterov = key
            _accumulate[grid(rows, block)](
                table_on(device, rows, self._taken),
                *self._maps[key],
                1 - beta,
                GRADIENT=FORMATS[dtype],
                MOMENTUM=momentum,
                PACKED=packed,
                NESTEROV=nesterov,
                FIELDS=len(rows[0]),
                **constants(block),
            )


class ApplyBatch:
    """Collects pieces for ``momentum.apply``; ``taken`` as for ``table_on``."""

    def __init__(self, taken: Tensor | None = None) -> None:
        self._taken = taken
        self._pieces: dict[Key, list[list[int]]] = {}
        self._levels: dict[Key, Tensor] = {}

    def take(self, weight: Tensor, update: Encoded, decay: float, factor: float) -> bool:
        """Whether the piece is taken; arguments are those of ``momentum.apply``."""
        block = common_block(weight, update)
        row = [weight.numel() // block if block else 0, *addresses(weight, update), bits(decay), bits(factor)]
        if not block or not aligned(row[1:-2]):
            return False
        key = (weight.device, weight.dtype, update.format, block)
        self._pieces.setdefault(key, []).append(row)
        self._levels[key] = update.pointers[2]
        return True

    def launch(self) -> None:
        """Computes what was taken."""
        for key, rows in self._pieces.items():
            device, dtype, update, block = key
            _apply[grid(rows, block)](
                table_on(device, rows, self._taken),
                self._levels[key],
                WEIGHT=FORMATS[dtype],
                UPDATE=update,
                FIELDS=len(rows[0]),
                **constants(block),
            )


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
        gradient = pointer_in(fields + 1, GRADIENT)
        elements = pointer_in(fields + 2, MOMENTUM)
        scales = pointer_in(fields + 3, "bf16")
        packed = pointer_in(fields + 4, PACKED)
        packed_scales = pointer_in(fields + 5, "bf16")
        place, mask, row, row_mask = tile_of_piece(rows, BLOCK, ROWS)
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
        weight = pointer_in(fields + 1, WEIGHT)
        elements = pointer_in(fields + 2, UPDATE)
        scales = pointer_in(fields + 3, "bf16")
        decay = number_in(fields + 4)
        factor = number_in(fields + 5)
        place, mask, row, row_mask = tile_of_piece(rows, BLOCK, ROWS)
        u = load_tile(elements, scales, levels, place, mask, row, row_mask, UPDATE)
        w = tl.load(weight + place, mask=mask, other=0).to(tl.float32)
        tl.store(weight + place, w * decay + factor * u, mask=mask)
