"""grid4: int4 codes scaled by rows and columns of tiles: what 4-bit-Muon-GRASP stores its residual in.

Within each tile of tile x tile elements, an element is divided by the smaller of its row's and its column's largest
magnitude. One outlier then coarsens the elements of its row or its column only where both have one.

Source: "4-bit-Muon-GRASP" (ICLR 2026, OpenReview g2l9bg9DWx); rank-1 normalisation by the smaller of two maxima is from
Li, Chen, Zhu, "Memory Efficient Optimizers with 4-bit States", arXiv 2309.01507.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from muon_dist.codecs.block4 import nearest, pack, packed_cols, tables_on, unpack
from muon_dist.codecs.blocks import SCALE_DTYPE, SMALLEST_SCALE, block_count, reciprocal
from muon_dist.codecs.protocol import BufferSpec
from muon_dist.kernels import Encoded, reader_of


@dataclass(frozen=True)
class Grid4:
    """Half a byte an element, and 4 bytes for each row (or column) of each tile.

    Attributes:
        tile: rows and columns of a tile.
        rows: of the largest part on any rank: all parts have as many column scales, so that they shard evenly.
        row_cuts: into how many parts the rows of the state are cut.
    """

    tile: int
    rows: int
    row_cuts: int
    name: str = "grid4"
    row_wise: bool = False

    def buffers(self, shape: Sequence[int]) -> dict[str, BufferSpec]:
        return self._specs(shape, parts=1)

    def whole(self, shape: Sequence[int]) -> dict[str, BufferSpec]:
        return self._specs(shape, parts=self.row_cuts)

    def for_kernels(self, buffers: Mapping[str, Tensor]) -> Encoded:
        return Encoded(self.name, buffers, self.tile, tables_on(reader_of(buffers["codes"]), "int4"))

    def encode(self, values: Tensor, buffers: Mapping[str, Tensor]) -> None:
        tiles = self._tiles(values.float())  # [..., tile rows, tile, tile columns, tile]
        row_scales = _storable(tiles.abs().amax(-1))  # [..., tile rows, tile, tile columns]
        col_scales = _storable(tiles.abs().amax(-3))  # [..., tile rows, tile columns, tile]
        fractions = tiles * reciprocal(_smaller(row_scales, col_scales))
        rows, cols = values.shape[-2:]
        buffers["row_scales"].copy_(row_scales.flatten(-3, -2)[..., :rows, :])
        buffers["col_scales"][..., : tiles.shape[-4], :].copy_(col_scales.flatten(-2)[..., :cols])
        # Rounding a scale can leave a fraction just above one: the nearest level is still the outermost.
        codes = nearest(fractions, "int4").flatten(-2).flatten(-3, -2)
        buffers["codes"].copy_(pack(codes[..., :rows, :cols]))

    def decode(self, buffers: Mapping[str, Tensor], cols: int, out: Tensor | None = None) -> Tensor:
        codes = buffers["codes"]
        fractions = self._tiles(tables_on(codes.device, "int4").levels[unpack(codes, cols)])
        row_scales = _padded(buffers["row_scales"], -2, self.tile).unflatten(-2, (-1, self.tile))
        col_scales = _padded(buffers["col_scales"], -1, self.tile).unflatten(-1, (-1, self.tile))
        tiles = fractions * _smaller(row_scales, col_scales[..., : fractions.shape[-4], :, :]).float()
        values = tiles.flatten(-2).flatten(-3, -2)[..., : codes.shape[-2], :cols]
        return values.contiguous() if out is None else out.copy_(values)

    def _tiles(self, values: Tensor) -> Tensor:
        padded = _padded(_padded(values, -1, self.tile), -2, self.tile)
        return padded.unflatten(-1, (-1, self.tile)).unflatten(-3, (-1, self.tile))

    def _specs(self, shape: Sequence[int], parts: int) -> dict[str, BufferSpec]:
        *stack, rows, cols = shape
        return {
            "codes": BufferSpec((*stack, rows, packed_cols(cols)), torch.uint8),
            "row_scales": BufferSpec((*stack, rows, block_count(cols, self.tile)), SCALE_DTYPE),
            "col_scales": BufferSpec((*stack, parts * math.ceil(self.rows / self.tile), cols), SCALE_DTYPE),
        }


def _storable(largest: Tensor) -> Tensor:
    return torch.where(largest < SMALLEST_SCALE, 0.0, largest).to(SCALE_DTYPE)


def _smaller(row_scales: Tensor, col_scales: Tensor) -> Tensor:
    """The scale of each element, ``[..., tile rows, tile, tile columns, tile]``."""
    return torch.minimum(row_scales.unsqueeze(-1), col_scales.unsqueeze(-3))


def _padded(values: Tensor, dim: int, tile: int) -> Tensor:
    """Filled up with zeros to whole tiles along dimension -1 or -2."""
    missing = -values.shape[dim] % tile
    return functional.pad(values, (0, missing) if dim == -1 else (0, 0, 0, missing)) if missing else values
