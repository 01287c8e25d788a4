"""accumulate and apply for many pieces in one launch: a launch costs the host more than a small piece the device.

Pieces are collected, then each launch reads their addresses from a table. Those that ``kernels/table.py`` cannot take
go through ``kernels/momentum.py`` one by one, which computes the same.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from muon_dist.kernels import Encoded, Tables, fit, look_ups, tables_of
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
from muon_dist.kernels.tiles import TILE_ELEMENTS, load_levels, load_search, load_tile, store_tile

# Of launches that read and write momentum on the host: a few large programs are enough for the bus, and leave the other
# multiprocessors to the polar factors that run meanwhile.
_HOST_PROGRAMS = 16
_HOST_TILE = 8 * TILE_ELEMENTS
# Of launches that accumulate: a program takes so many tiles one after the other, since what it does before the first
# is a sixth of what a tile takes; but there are to be programs enough for every multiprocessor, several times.
_TILES = 4
_PROGRAMS = 4096
# dynamic8 would take 72, with which seven programs fit on a multiprocessor instead of eight. None is spilled.
_REGISTERS_OF_DYNAMIC8 = 64


class Entry(NamedTuple):
    """What a row of the table says of a piece in every step, whatever memory the step's tensors have.

    Attributes:
        alike: pieces of which this is the same can share a launch.
        tables: of codes that are looked up, if there are any.
        blocks: of the piece.
        in_whole: bytes from the start of the gradient or weight that the piece is cut out of.
        stored: addresses of the momentum's elements and scales; none for apply.
        in_packed: bytes from the start of the piece that travels to its elements and its scales.
    """

    alike: Key
    tables: Tables | None
    blocks: int
    in_whole: int
    stored: tuple[int, ...]
    in_packed: tuple[int, ...]

    @classmethod
    def of(
        cls, whole: Tensor, piece: Tensor, packed: Tensor, travelling: Encoded, momentum: Encoded | None = None
    ) -> Entry | None:
        """None where a piece cannot share a launch.

        Args:
            whole: the gradient or the weight.
            piece: [rows, cols] out of it.
            packed: the bytes that travel, uint8, and ``travelling`` what they are.
        """
        values = (travelling,) if momentum is None else (momentum, travelling)
        block = common_block(piece, *values)
        is_view = piece.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        if not block or not is_view or not fit(piece.shape, *values):
            return None
        alike = (piece.device, piece.dtype, *(value.format for value in values), block)
        if momentum is not None:
            alike = (*alike, momentum.pointers[0].device != piece.device)
        stored = () if momentum is None else addresses(momentum)
        in_packed = tuple(address - packed.data_ptr() for address in addresses(travelling))
        in_whole = piece.data_ptr() - whole.data_ptr()
        if not aligned([*stored, *in_packed]):
            return None
        return cls(alike, tables_of(*values), piece.numel() // block, in_whole, stored, in_packed)

    def row(self, whole: Tensor, packed: Tensor) -> list[int] | None:
        """Of the table in this step; None where memory is not aligned."""
        address, start = whole.data_ptr() + self.in_whole, packed.data_ptr()
        if address % 16 or start % 16:
            return None
        return [self.blocks, address, *self.stored, *(start + offset for offset in self.in_packed)]


class AccumulateBatch:
    """Collects pieces for ``momentum.accumulate``; ``taken`` as for ``table_on``."""

    def __init__(self, taken: Tensor | None = None) -> None:
        self._taken = taken
        self._pieces: dict[Key, list[list[int]]] = {}
        self._gradients: list[Tensor] = []  # one may be a copy that nobody else keeps until the launch
        self._tables: dict[Key, Tables | None] = {}

    def take(self, entry: Entry, gradient: Tensor, packed: Tensor, beta: float, nesterov: bool) -> bool:
        """Whether the piece is taken; ``gradient`` is the whole that it is cut out of."""
        row = entry.row(gradient, packed)
        if row is None:
            return False
        key = (*entry.alike, beta, nesterov)
        self._pieces.setdefault(key, []).append(row)
        self._gradients.append(gradient)
        self._tables[key] = entry.tables
        return True

    def launch(self) -> None:
        """Computes what was taken."""
        for key, rows in self._pieces.items():
            device, dtype, momentum, packed, block, is_on_host, beta, nesterov = key
            table = table_on(device, rows, self._taken)
            tiles, pieces = grid(rows, block)
            launch = (max(-(-tiles // _TILES), min(tiles, -(-_PROGRAMS // pieces))), pieces)
            shape = constants(block) | ({"maxnreg": _REGISTERS_OF_DYNAMIC8} if momentum == "dynamic8" else {})
            if is_on_host:
                launch = (max(1, _HOST_PROGRAMS // len(rows)), len(rows))
                shape = {"BLOCK": block, "ROWS": _HOST_TILE // block, "num_warps": 16}
            _accumulate[launch](
                table,
                *look_ups(self._tables[key], table),
                1 - beta,
                GRADIENT=FORMATS[dtype],
                MOMENTUM=momentum,
                PACKED=packed,
                NESTEROV=nesterov,
                FIELDS=len(rows[0]),
                **shape,
            )


class ApplyBatch:
    """Collects pieces for ``momentum.apply``; ``taken`` as for ``table_on``."""

    def __init__(self, taken: Tensor | None = None) -> None:
        self._taken = taken
        self._pieces: dict[Key, list[list[int]]] = {}
        self._tables: dict[Key, Tables | None] = {}

    def take(self, entry: Entry, weight: Tensor, packed: Tensor, decay: float, factor: float) -> bool:
        """Whether the piece is taken; ``weight`` is the whole that it is cut out of."""
        row = entry.row(weight, packed)
        if row is None:
            return False
        self._pieces.setdefault(entry.alike, []).append([*row, bits(decay), bits(factor)])
        self._tables[entry.alike] = entry.tables
        return True

    def launch(self) -> None:
        """Computes what was taken."""
        for key, rows in self._pieces.items():
            device, dtype, update, block = key
            table = table_on(device, rows, self._taken)
            _apply[grid(rows, block)](
                table,
                look_ups(self._tables[key], table)[0],
                WEIGHT=FORMATS[dtype],
                UPDATE=update,
                FIELDS=len(rows[0]),
                **constants(block),
            )


@triton.jit
def _accumulate(
    table,
    levels,
    search,
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
    rows = tl.load(fields).to(tl.int32)  # blocks; a piece has fewer than 2^31
    gradient = pointer_in(fields + 1, GRADIENT)
    elements = pointer_in(fields + 2, MOMENTUM)
    scales = pointer_in(fields + 3, "bf16")
    packed = pointer_in(fields + 4, PACKED)
    packed_scales = pointer_in(fields + 5, "bf16")
    levels = load_levels(levels, MOMENTUM)
    packed_search, search = load_search(search, PACKED), load_search(search, MOMENTUM)
    for index in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        tile = tile_of_piece(index, rows, BLOCK, ROWS)
        place, mask = tile[0]
        g = tl.load(gradient + place, mask=mask).to(tl.float32)
        g *= weight
        m = load_tile(elements, scales, levels, tile, 1 - weight, MOMENTUM) + g
        # First what needs the gradient: its registers, a fifth of all, are then free for what needs most.
        u = (1 - weight) * m + g if NESTEROV else m
        store_tile(u, packed, packed_scales, packed_search, tile, PACKED)
        store_tile(m, elements, scales, search, tile, MOMENTUM)


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
    rows = tl.load(fields).to(tl.int32)  # blocks; a piece has fewer than 2^31
    levels = load_levels(levels, UPDATE)  # not under the condition, as in adamw.py
    if tl.program_id(0) * ROWS < rows:
        weight = pointer_in(fields + 1, WEIGHT)
        elements = pointer_in(fields + 2, UPDATE)
        scales = pointer_in(fields + 3, "bf16")
        decay = number_in(fields + 4)
        factor = number_in(fields + 5)
        tile = tile_of_piece(tl.program_id(0), rows, BLOCK, ROWS)
        place, mask = tile[0]
        u = load_tile(elements, scales, levels, tile, factor, UPDATE)
        w = tl.load(weight + place, mask=mask, other=0).to(tl.float32)
        tl.store(weight + place, w * decay + u, mask=mask)
