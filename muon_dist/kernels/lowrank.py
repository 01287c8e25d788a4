"""accumulate for momenta that are a low-rank part and a stored rest: one pass before the factors follow, one after.

The momentum itself never lies in memory in fp32. The first pass makes it of the stored rest, the low-rank part and the
gradient, for the products in bf16 and for the wire; the second takes the new low-rank part away and stores what is
left. Reference: ``accumulate_pieces`` in ``muon_dist/stacks.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from muon_dist.kernels import Encoded, fit
from muon_dist.kernels.block4 import load_codes, store_codes
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
from muon_dist.kernels.tiles import encode_grid, load_levels, load_search, load_tile, store_tile


class Pieces(NamedTuple):
    """Pieces of one shape, by their addresses."""

    table: Tensor
    grid: tuple[int, int]
    block: int
    shape: torch.Size
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
            place = [gradient.data_ptr(), *addresses(rest, wire), rest.of_columns.data_ptr()]
            if not block or not fit(gradient.shape, rest, wire) or wire.tables is not None or not aligned(place):
                return None
            rows.append([gradient.numel() // block, *place])
        first = gradients[0]
        table = table_on(first.device, rows, taken)
        return cls(table, grid(rows, block), block, first.shape, first.dtype, rests[0], packed[0].format)

    def accumulate(self, low: Tensor, beta: float, nesterov: bool) -> Tensor:
        """Packs what is to be orthogonalised; returns the new momenta, [n, rows, cols], bf16, in the memory of ``low``.

        Args:
            low: the low-rank parts as stored, [n, rows, cols], bf16.
            beta, nesterov: as in Muon.
        """
        _accumulate[self.grid](
            self.table,
            low,
            self.rest.pointers[2],
            1 - beta,
            self.shape[1] // self.block,
            GRADIENT=FORMATS[self.gradient],
            REST=self.rest.format,
            TILE=self.rest.block,
            PACKED=self.packed,
            NESTEROV=nesterov,
            FIELDS=self.table.shape[1],
            **constants(self.block),
        )
        return low

    def store(self, momentum: Tensor, low: Tensor) -> None:
        """Stores what the new low-rank parts leave of the momenta, both [n, rows, cols], bf16."""
        if self.rest.format == "grid4":
            (rows, cols), tile = self.shape, self.rest.block
            assert tile is not None
            _store_grid[-(-rows // tile) * (cols // self.block), len(momentum)](
                self.table,
                momentum,
                low,
                rows,
                cols,
                cols // self.block,
                FIELDS=self.table.shape[1],
                TILE=tile,
                BLOCK=self.block,
                num_warps=8,
            )
            return
        _store[self.grid](
            self.table,
            momentum,
            low,
            *self.rest.pointers[3:],
            REST=self.rest.format,
            FIELDS=self.table.shape[1],
            **constants(self.block),
        )


@triton.jit
def _accumulate(
    table,
    low,
    levels,
    weight,
    blocks,
    GRADIENT: tl.constexpr,
    REST: tl.constexpr,
    TILE: tl.constexpr,
    PACKED: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    fields = table + tl.program_id(1) * FIELDS
    rows = tl.load(fields)
    tile = tile_of_piece(tl.program_id(0), rows, BLOCK, ROWS)
    place, mask = tile[0]
    pair, pair_mask = tile[1]
    row, row_mask = tile[2]
    levels = load_levels(levels, REST)
    elements = pointer_in(fields + 2, REST)
    scales = pointer_in(fields + 3, "bf16")
    if REST == "grid4":
        # A row of the tile is block ``row % blocks`` of the piece's row ``row // blocks``.
        of_columns = pointer_in(fields + 6, "bf16") + row // blocks // TILE * (blocks * BLOCK) + row % blocks * BLOCK
        of_row = tl.load(scales + row, mask=row_mask, other=0).to(tl.float32)
        of_column = tl.load(of_columns + tl.arange(0, BLOCK)[None, :], mask=mask, other=0).to(tl.float32)
        scale = tl.minimum(of_row, of_column, propagate_nan=tl.PropagateNan.ALL)
        m = load_codes(elements, levels, pair, pair_mask) * scale
    else:
        m = load_tile(elements, scales, levels, tile, 1.0, REST)
    place_in_stack = tl.program_id(1) * rows * BLOCK + place
    m += tl.load(low + place_in_stack, mask=mask, other=0).to(tl.float32)
    g = tl.load(pointer_in(fields + 1, GRADIENT) + place, mask=mask, other=0).to(tl.float32)
    g *= weight
    m = (1 - weight) * m + g
    tl.store(low + place_in_stack, m, mask=mask)
    if NESTEROV:
        m = (1 - weight) * m + g
    packed = pointer_in(fields + 4, PACKED)
    packed_scales = pointer_in(fields + 5, "bf16")
    store_tile(m, packed, packed_scales, levels, tile, PACKED)


@triton.jit
def _store(
    table,
    momentum,
    low,
    search,
    REST: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    fields = table + tl.program_id(1) * FIELDS
    rows = tl.load(fields)
    tile = tile_of_piece(tl.program_id(0), rows, BLOCK, ROWS)
    place, mask = tile[0]
    place_in_stack = tl.program_id(1) * rows * BLOCK + place
    search = load_search(search, REST)
    left = tl.load(momentum + place_in_stack, mask=mask, other=0).to(tl.float32)
    left -= tl.load(low + place_in_stack, mask=mask, other=0).to(tl.float32)
    elements = pointer_in(fields + 2, REST)
    scales = pointer_in(fields + 3, "bf16")
    store_tile(left, elements, scales, search, tile, REST)


@triton.jit
def _store_grid(
    table,
    momentum,
    low,
    rows,
    cols,
    blocks,
    FIELDS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program stores a whole tile: the scales of its columns are over all its rows."""
    fields = table + tl.program_id(1) * FIELDS
    tile_row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first_row = tile_row * TILE
    height = tl.where(tl.load(fields) > 0, rows - first_row, 0)  # no rows in a step that is not taken
    # Places in the tile are 32 bits wide, those of the tile 64: a tile fills the registers.
    start = first_row.to(tl.int64) * cols + block * BLOCK
    row = tl.arange(0, TILE)[:, None]
    place = row * cols + tl.arange(0, BLOCK)[None, :]
    mask = tl.broadcast_to(row < height, (TILE, BLOCK))
    in_stack = tl.program_id(1).to(tl.int64) * rows * cols + start
    left = tl.load(momentum + in_stack + place, mask=mask, other=0).to(tl.float32)
    left -= tl.load(low + in_stack + place, mask=mask, other=0).to(tl.float32)
    codes, of_row, of_column = encode_grid(left)
    pair = row * (cols // 2) + tl.arange(0, BLOCK // 2)[None, :]
    pair_mask = tl.broadcast_to(row < height, (TILE, BLOCK // 2))
    store_codes(codes, pointer_in(fields + 2, "grid4") + start // 2, pair, pair_mask)
    tl.store(pointer_in(fields + 3, "bf16") + (first_row + row) * blocks + block, of_row, mask=row < height)
    any_row = tl.max(mask.to(tl.int32), axis=0, keep_dims=True) != 0
    col = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(pointer_in(fields + 6, "bf16") + tile_row * cols + col, of_column, mask=any_row)
