"""Codecs: idempotent, shard-invariant, within their error bounds, on any shape and any block."""

from __future__ import annotations

from typing import Literal, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from muon_dist.codecs import Codec, make_codec
from muon_dist.codecs.block4 import LEVELS
from muon_dist.codecs.blocks import SMALLEST_SCALE
from muon_dist.codecs.dynamic8 import dynamic_map
from muon_dist.options import RowWiseState

ROW_WISE = get_args(RowWiseState)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 70))
blocks = st.sampled_from([1, 3, 16, 64, 128])


def stored(codec: Codec, values: Tensor) -> dict[str, Tensor]:
    buffers = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in codec.buffers(values.shape).items()}
    codec.encode(values, buffers)
    return buffers


def matrix(shape: tuple[int, int], seed: int) -> Tensor:
    """Rows of very different sizes, some elements and one row zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * torch.logspace(-12, 6, shape[0]).unsqueeze(1)
    values[torch.rand(shape, generator=generator) < 0.1] = 0
    values[seed % shape[0]] *= seed % 2
    return values


@pytest.mark.parametrize("name", ROW_WISE)
@given(shape=shapes, block=blocks, seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_encoding_what_was_decoded_changes_nothing(
    name: RowWiseState, shape: tuple[int, int], block: int, seed: int
) -> None:
    codec = make_codec(name, block)
    once = stored(codec, matrix(shape, seed))
    twice = stored(codec, codec.decode(once, shape[1]))
    assert all(torch.equal(once[key], twice[key]) for key in once)


@pytest.mark.parametrize("name", ROW_WISE)
@given(shape=shapes, block=blocks, seed=st.integers(0, 1000), cut=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_a_state_cut_between_rows_is_the_cut_state(
    name: RowWiseState, shape: tuple[int, int], block: int, seed: int, cut: int
) -> None:
    codec, values = make_codec(name, block), matrix(shape, seed)
    whole, parts = stored(codec, values), [stored(codec, values[:cut]), stored(codec, values[cut:])]
    for key in whole:
        assert torch.equal(whole[key], torch.cat([part[key] for part in parts]))


@given(shape=shapes, block=blocks, seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_linear8_is_off_by_half_a_step_at_most(shape: tuple[int, int], block: int, seed: int) -> None:
    codec, values = make_codec("linear8", block), matrix(shape, seed)
    buffers = stored(codec, values)
    scales = buffers["scales"].float().repeat_interleave(block, 1)[:, : shape[1]]
    assert ((codec.decode(buffers, shape[1]) - values).abs() <= scales * (1.001 / 254) + SMALLEST_SCALE).all()


@pytest.mark.parametrize("signed", [True, False])
@given(shape=shapes, block=blocks, seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_dynamic8_takes_the_nearest_level(signed: bool, shape: tuple[int, int], block: int, seed: int) -> None:
    codec = make_codec("dynamic8", block, signed=signed)
    values = matrix(shape, seed) if signed else matrix(shape, seed).abs()
    buffers = stored(codec, values)
    scales = buffers["scales"].float().repeat_interleave(block, 1)[:, : shape[1]]
    levels = torch.tensor(dynamic_map(signed), dtype=torch.float32)
    padded = torch.nn.functional.pad(values, (0, -shape[1] % block)).unflatten(1, (-1, block))
    largest = padded.abs().amax(-1).repeat_interleave(block, 1)[:, : shape[1]] * scales.sign()
    fractions = torch.where(scales == 0, 0, values / largest)
    nearest = (fractions.unsqueeze(-1) - levels).abs().amin(-1)
    chosen = torch.where(scales == 0, 0, codec.decode(buffers, shape[1]) / scales - fractions).abs()
    assert (chosen <= nearest + 1e-6).all()


@pytest.mark.parametrize("name", ["int4", "nf4"])
@given(shape=shapes, block=blocks, seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_four_bits_take_the_nearest_level(
    name: Literal["int4", "nf4"], shape: tuple[int, int], block: int, seed: int
) -> None:
    codec, values = make_codec(name, block), matrix(shape, seed)
    buffers = stored(codec, values)
    assert sum(buffer.nbytes for buffer in buffers.values()) == shape[0] * (
        -(-shape[1] // 2) + 2 * -(-shape[1] // block)
    )
    scales = buffers["scales"].float().repeat_interleave(block, 1)[:, : shape[1]]
    fractions = torch.where(scales == 0, 0, values / scales)
    nearest = (fractions.unsqueeze(-1) - torch.tensor(LEVELS[name])).abs().amin(-1)
    chosen = torch.where(scales == 0, 0, codec.decode(buffers, shape[1]) / scales - fractions).abs()
    assert (chosen <= nearest + 1e-6).all()


@pytest.mark.parametrize("name", ["linear8", "dynamic8", "int4", "nf4"])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([0.0] * 8, [0.0] * 8),
        ([1e38] + [0.0] * 7, [1e38] + [0.0] * 7),
        ([1e-40] * 8, [0.0] * 8),
        ([-3.0] + [1e-30] * 7, [-3.0] + [0.0] * 7),
        ([1.0, -1.0] * 4, None),
    ],
    ids=["zeros", "one huge entry", "denormals", "one negative entry", "both signs"],
)
def test_adversarial_blocks(name: RowWiseState, row: list[float], expected: list[float] | None) -> None:
    codec = make_codec(name, 8)
    decoded = codec.decode(stored(codec, torch.tensor([row])), 8)
    assert torch.allclose(decoded, torch.tensor([expected or row]), rtol=0.01)


@pytest.mark.parametrize("name", ROW_WISE)
def test_nan_stays_visible(name: RowWiseState) -> None:
    codec = make_codec(name, 8)
    values = torch.ones(1, 8)
    values[0, 3] = float("nan")
    assert codec.decode(stored(codec, values), 8)[0, 3].isnan()


@pytest.mark.parametrize("name", ROW_WISE)
def test_fresh_buffers_decode_to_zeros(name: RowWiseState) -> None:
    codec = make_codec(name, 8)
    zeros = {key: torch.zeros(spec.shape, dtype=spec.dtype) for key, spec in codec.buffers((3, 20)).items()}
    assert (codec.decode(zeros, 20) == 0).all()


def test_the_dynamic_map_is_that_of_bitsandbytes() -> None:
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    assert len(set(signed)) == len(set(unsigned)) == 256
    # Values of bitsandbytes.functional.create_dynamic_map, read from its documentation and source.
    assert signed[0] == pytest.approx(-0.99296875)
    assert signed[-1] == unsigned[-1] == 1.0
    assert signed[127] == 0.0
    assert signed[128] == pytest.approx(5.5e-7)
    assert unsigned[:2] == [0.0, pytest.approx(3.25e-7)]
