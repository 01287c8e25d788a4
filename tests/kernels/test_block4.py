"""4-bit codes in kernels are those of plain torch, bit for bit: compiled on CUDA, in Triton's interpreter elsewhere."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from muon_dist import kernels
from muon_dist.codecs.block4 import LEVELS, Block4, Map, tables_on

if not kernels.HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from muon_dist.kernels import block4

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILE = 1 << 12 if DEVICE.type == "cuda" else 1 << 16
every_map = pytest.mark.parametrize("name", get_args(Map))


@every_map
def test_codes_are_the_references(name: Map) -> None:
    """At each border and its fp32 neighbours, at each level, and anywhere up to what rounding a scale leaves above one;
    an element that is on a border has the code below it."""
    tables = tables_on(DEVICE, name)
    borders, infinity = tables.borders.cpu(), torch.tensor(float("inf"))
    around = (borders, torch.nextafter(borders, infinity), torch.nextafter(borders, -infinity))
    anywhere = 2.02 * torch.rand(2**19, generator=torch.Generator().manual_seed(0)) - 1.01
    values = torch.cat([*around, torch.tensor([0.0, -0.0, 1.01, -1.01, *LEVELS[name]]).clamp(-1.01, 1.01), anywhere])
    values = torch.nn.functional.pad(values, (0, -len(values) % TILE)).to(DEVICE)
    codes = torch.empty(len(values), dtype=torch.int32, device=DEVICE)
    _nearest[len(values) // TILE,](values, tables.search, codes, TILE=TILE)
    assert torch.equal(codes, torch.bucketize(values, tables.borders, out_int32=True))


@every_map
def test_a_cell_has_one_border(name: Map) -> None:
    """And each border is in a cell by more than what rounding could move it."""
    borders = tables_on(DEVICE, name).borders.double().cpu()
    places = borders * 14 + 16 + 1 / 16  # an eighth of a cell is where kernels stop to tell fractions apart
    assert len(places.floor().unique()) == len(borders)
    assert float((places - places.round()).abs().min()) > 0.02


@every_map
@pytest.mark.parametrize("shape", [(40, 256), (3, 700), (1, 255)])
def test_blocks_are_encoded_as_the_reference_does(
    name: Map, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where blocks are zeros, too small to store, or hold NaN, where rounding the scale leaves an element above
    one, and where the last byte has one code."""
    codec = Block4(128, name)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator) * 10 ** (8 * torch.rand((shape[0], 1), generator=generator) - 4)
    if shape[0] > 4:
        values[0], values[1], values[2, 5] = 0.0, 1e-38, float("nan")
        values[3:7, 0] = torch.tensor([1.0039, -1.0039, 2.0078, -1.999]) * 7
    values = values.to(DEVICE)

    def stored(fused: bool) -> tuple[dict[str, Tensor], Tensor]:
        monkeypatch.setattr(kernels, "usable_on", lambda device: fused)
        buffers = {n: torch.zeros(s.shape, dtype=s.dtype, device=DEVICE) for n, s in codec.buffers(shape).items()}
        codec.encode(values, buffers)
        return buffers, codec.decode(buffers, shape[1])

    (ours, decoded), (theirs, expected) = stored(fused=True), stored(fused=False)
    known = ~theirs["scales"].isnan()
    assert torch.equal(ours["scales"].isnan(), ~known)
    assert torch.equal(ours["scales"][known], theirs["scales"][known])
    of_elements = known.repeat_interleave(128, dim=1)[:, : shape[1]]
    of_codes = of_elements[:, ::2]  # two codes a byte, of one block
    assert torch.equal(ours["codes"][of_codes], theirs["codes"][of_codes])
    assert torch.equal(decoded[of_elements], expected[of_elements])
    assert bool(decoded[~of_elements].isnan().all())


@triton.jit
def _nearest(values, search, codes, TILE: tl.constexpr):
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(codes + place, block4.nearest(tl.load(values + place), block4.load_search(search)))
