"""dynamic8 in kernels is dynamic8 in plain torch, bit for bit: compiled on CUDA, in Triton's interpreter elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from muon_dist import kernels
from muon_dist.codecs.dynamic8 import Dynamic8, dynamic_map
from muon_dist.kernels import Tables

if not kernels.HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from muon_dist.kernels import dynamic8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = 1 << 12 if DEVICE == "cuda" else 1 << 16
both_maps = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def tables(signed: bool) -> Tables:
    buffers = {"codes": torch.empty(1, dtype=torch.uint8, device=DEVICE)}
    found = Dynamic8(128, signed).for_kernels(buffers).tables
    assert found is not None
    return found


def fractions(borders: Tensor, signed: bool) -> Tensor:
    """Each border with both fp32 neighbours, each level, and a million numbers up to a little above one, half of them
    of all exponents, half of them where the levels are; padded to whole tiles."""
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (2**19,), generator=generator).int().view(torch.float32)
    inside = 10 ** (-9 * torch.rand(2**19, generator=generator)) * torch.randn(2**19, generator=generator).sign()
    infinity = torch.tensor(float("inf"))
    around = (borders, torch.nextafter(borders, infinity), torch.nextafter(borders, -infinity))
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.004, -1.004, *dynamic_map(True), *dynamic_map(False)])
    values = torch.cat([*around, special, anything[anything.abs() < 1.004], inside])
    values = values if signed else values.abs()
    return torch.nn.functional.pad(values, (0, -len(values) % TILE))


@both_maps
def test_codes_are_the_references(signed: bool) -> None:
    """An element that is on a border has the code below it."""
    levels, borders, search = tables(signed)
    values = fractions(borders.cpu(), signed).to(DEVICE)
    codes = torch.empty(len(values), dtype=torch.uint8, device=DEVICE)
    _encode[len(values) // TILE,](values, search, codes, SIGNED=signed, TILE=TILE)
    assert torch.equal(codes.int(), torch.bucketize(values, borders, out_int32=True))
    decoded = torch.empty_like(levels)
    _decode[1,](torch.arange(256, dtype=torch.uint8, device=DEVICE), levels, decoded)
    assert torch.equal(decoded.cpu(), torch.tensor(dynamic_map(signed)))


@both_maps
def test_a_guess_is_within_a_half(signed: bool) -> None:
    """Of the code above, at the borders, and so everywhere: guesses do not fall. What rounding can add is far less than
    what is left. Beyond the map, and of what is no number, they lie in it."""
    borders, infinity = tables(signed).borders, float("inf")
    smallest, largest = torch.tensor([[-1.0039 if signed else 0.0], [1.0039]], device=DEVICE)
    no_fractions = torch.tensor([infinity, -infinity, float("nan"), -2.0, 2.0], device=DEVICE)
    values = torch.cat([smallest, borders, largest, no_fractions])
    guesses = torch.zeros(512, device=DEVICE)
    _guess[2,](torch.nn.functional.pad(values, (0, 512 - len(values))), guesses, SIGNED=signed)
    guesses *= dynamic8._LAST.value
    ascending = guesses[:257]
    code_above = torch.arange(1, 256, device=DEVICE)
    assert float((ascending[1:256] - code_above).abs().max()) < 0.47
    assert bool((ascending.diff() > 0).all())
    assert 0 <= float(guesses.min()) <= float(guesses.max()) < 255.47


@both_maps
def test_blocks_are_encoded_as_the_reference_does(signed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the largest element is there with both signs, where rounding takes its scale far from it, and where
    blocks are zeros, too small to store, or hold NaN."""
    codec, shape = Dynamic8(128, signed), (40, 256)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator) * 10 ** (8 * torch.rand((40, 1), generator=generator) - 4)
    values[0, :2] = torch.tensor([-9.0, 9.0])
    values[1], values[2], values[3, 5] = 0.0, 1e-38, float("nan")
    values[4:8, 0] = torch.tensor([1.0039, -1.0039, 2.0078, -1.999]) * 7  # of which bf16 scales are 0.4% off
    values = (values if signed else values.abs()).to(DEVICE)
    stored = []
    for fused in (True, False):
        monkeypatch.setattr(kernels, "usable_on", lambda device, fused=fused: fused)
        buffers = {n: torch.zeros(s.shape, dtype=s.dtype, device=DEVICE) for n, s in codec.buffers(shape).items()}
        codec.encode(values, buffers)
        stored.append((buffers, codec.decode(buffers, shape[1])))
    (ours, decoded), (theirs, expected) = stored
    assert torch.equal(ours["scales"].isnan(), theirs["scales"].isnan())
    known = ~theirs["scales"].isnan().repeat_interleave(128, dim=1)
    assert torch.equal(ours["scales"].nan_to_num(), theirs["scales"].nan_to_num())
    assert torch.equal(ours["codes"][known], theirs["codes"][known])
    assert torch.equal(decoded[known], expected[known])
    assert bool(decoded[~known].isnan().all())


@triton.jit
def _encode(values, search, codes, SIGNED: tl.constexpr, TILE: tl.constexpr):
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(codes + place, dynamic8.encode(tl.load(values + place), 1.0, tl.load(search + tl.arange(0, 256)), SIGNED))


@triton.jit
def _decode(codes, levels, out):
    place = tl.arange(0, 256)
    tl.store(out + place, dynamic8.look_up(tl.load(levels + place), tl.load(codes + place).to(tl.int32)))


@triton.jit
def _guess(values, out, SIGNED: tl.constexpr):
    place = tl.program_id(0) * 256 + tl.arange(0, 256)
    tl.store(out + place, dynamic8.guess(tl.load(values + place), 1.0, SIGNED))
