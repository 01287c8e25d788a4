"""Wire formats: many pieces at once, anywhere in a buffer, are the bytes and the values of each piece alone."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from muon_dist.options import Wire
from muon_dist.wire import wire_format


@pytest.mark.parametrize("name", get_args(Wire))
@pytest.mark.parametrize(("rows", "cols"), [(3, 256), (5, 130), (1, 9)])
def test_pieces_in_a_strided_buffer_are_each_piece_alone(name: Wire, rows: int, cols: int) -> None:
    wire = wire_format(name)
    nbytes = wire.nbytes(rows, cols)
    matrices, pieces = 2, 3
    values = torch.randn(matrices, pieces, rows, cols, generator=torch.Generator().manual_seed(0))
    buffer = torch.zeros(2 * matrices * pieces * nbytes + 16, dtype=torch.uint8)
    packed = buffer.as_strided((matrices, pieces, nbytes), (nbytes, 2 * matrices * nbytes, 1), 16)
    wire.pack(values, packed)
    unpacked = wire.unpack(packed, rows, cols)
    for i in range(matrices):
        for j in range(pieces):
            alone = torch.zeros(1, nbytes, dtype=torch.uint8)
            wire.pack(values[i, j][None], alone)
            assert torch.equal(alone[0], packed[i, j])
            assert torch.equal(wire.unpack(alone, rows, cols)[0], unpacked[i, j])
