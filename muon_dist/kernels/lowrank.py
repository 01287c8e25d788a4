"""accumulate for momenta that are a low-rank part and a stored rest: one pass before the factors follow, one after.

The momentum itself never lies in memory in fp32. The first pass makes it of the stored rest, the low-rank part and the
gradient, for the products in bf16 and for the wire; the second makes it once more, takes the new low-rank part away and
stores what is left. Reference: ``accumulate_pieces`` in ``muon_dist/stacks.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from muon_dist.kernels import Encoded, fit
from muon_dist.kernels.table import (
    FORMATS,
    addresses,
    aligned,
    common_block,
    constants,
    grid,
    pointer_in,
    table_on,
    tile_of_piece,
)
from muon_dist.kernels.tiles import load_tile, store_tile


class Pieces(NamedTuple):
    """Pieces of one shape, by their addresses."""

    table: Tensor
    grid: tuple[int, int]
    block: int
    gradient: torch.dtype
    rest: Encoded  # one for all, but for its elements and scales
    packed: str

    @classmethod
    def of(
        cls, gradients: Sequence[Tensor], rests: Sequence[Encoded], packed: Sequence[Encoded], taken: Tensor | None
    ) -> Pieces | None:
        """None where kernels cannot take them.

        Args:
            gradients: [rows, cols] each, fp32, bf16 or fp16.
            rests: what the low-rank part leaves, stored; updated in place.
            packed: where what is to be orthogonalised goes.
            taken: as for ``table_on``.
        """
        rows = []
        for gradient, rest, wire in zip(gradients, rests, packed, strict=True):
            block = common_block(gradient, rest, wire)
            place = addresses(gradient, rest, wire)
            if not block or not fit(gradient.shape, rest, wire) or wire.tables is not None or not aligned(place):
                return None
            rows.append([gradient.numel() // block, *place])
        first = gradients[0]
        return cls(
            table_on(first.device, rows, taken), grid(rows, block), block, first.dtype, rests[0], packed[0].format
        )

    def accumulate(self, low: Tensor, beta: float, nesterov: bool) -> Tensor:
        """Packs what is to be orthogonalised; returns the new momenta, [n, rows, cols], bf16.

        Args:
            low: the low-rank parts as stored, [n, rows, cols], bf16.
            beta, nesterov: as in Muon.
        """
        momentum = torch.empty_like(low)
        _accumulate[self.grid](
            self.table,
            low,
            momentum,
            self.rest.pointers[2],
            1 - beta,
            GRADIENT=FORMATS[self.gradient],
            REST=self.rest.format,
            PACKED=self.packed,
            NESTEROV=nesterov,
            FIELDS=self.table.shape[1],
            **constants(self.block),
        )
        return momentum

    def store(self, low: Tensor, new_low: Tensor, beta: float) -> None:
        """Stores what the new low-rank parts leave of the new momenta."""
        _store[self.grid](
            self.table,
            low,
            new_low,
            *self.rest.pointers[2:],
            1 - beta,
            GRADIENT=FORMATS[self.gradient],
            REST=self.rest.format,
            FIELDS=self.table.shape[1],
            **constants(self.block),
        )


@triton.jit
def _momentum(fields, low, levels, weight, place, mask, row, row_mask, GRADIENT: tl.constexpr, REST: tl.constexpr):
    """The new momentum of a tile, and its gradient."""
    g = tl.load(pointer_in(fields + 1, GRADIENT) + place, mask=mask, other=0).to(tl.float32)
    elements = pointer_in(fields + 2, REST)
    m = load_tile(elements, pointer_in(fields + 3, "bf16"), levels, place, mask, row, row_mask, REST)
    m += tl.load(low + place, mask=mask, other=0).to(tl.float32)
    return m + weight * (g - m), g


@triton.jit
def _accumulate(
    table,
    low,
    momentum,
    levels,
    weight,
    GRADIENT: tl.constexpr,
    REST: tl.constexpr,
    PACKED: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    fields = table + tl.program_id(1) * FIELDS
    rows = tl.load(fields)
    start = tl.program_id(1) * rows * BLOCK  # of this piece in the stacks
    place, mask, row, row_mask = tile_of_piece(rows, BLOCK, ROWS)
    m, g = _momentum(fields, low + start, levels, weight, place, mask, row, row_mask, GRADIENT, REST)
    tl.store(momentum + start + place, m, mask=mask)
    if NESTEROV:
        m -= weight * (m - g)
    packed = pointer_in(fields + 4, PACKED)
    packed_scales = pointer_in(fields + 5, "bf16")
    store_tile(m, packed, packed_scales, levels, levels, place, mask, row, row_mask, PACKED)


@triton.jit
def _store(
    table,
    low,
    new_low,
    levels,
    borders,
    starts,
    weight,
    GRADIENT: tl.constexpr,
    REST: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    fields = table + tl.program_id(1) * FIELDS
    rows = tl.load(fields)
    start = tl.program_id(1) * rows * BLOCK
    place, mask, row, row_mask = tile_of_piece(rows, BLOCK, ROWS)
    m, _ = _momentum(fields, low + start, levels, weight, place, mask, row, row_mask, GRADIENT, REST)
    m -= tl.load(new_low + start + place, mask=mask, other=0).to(tl.float32)
    elements = pointer_in(fields + 2, REST)
    scales = pointer_in(fields + 3, "bf16")
    store_tile(m, elements, scales, borders, starts, place, mask, row, row_mask, REST)
