"""Regions: whatever two parts of a tensor share is copied, and nothing else, for boxes and runs of any shape."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from muon_dist.regions import Region, shared

shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    def part(size: int) -> tuple[int, int]:
        start = draw(st.integers(0, size))
        return start, draw(st.integers(0, size - start))

    if draw(st.booleans()):
        start, length = part(math.prod(shape))
        return Region(shape, (start,), (length,), flat=True)
    parts = [part(size) for size in shape]
    return Region(shape, tuple(start for start, _ in parts), tuple(size for _, size in parts))


def held(whole: Tensor, region: Region) -> Tensor:
    """What a rank with this region has of ``whole``."""
    if region.flat:
        (start,), (length,) = region.offset, region.size
        return whole.flatten()[start : start + length].view(region.local_shape).clone()
    slices = tuple(slice(start, start + size) for start, size in zip(region.offset, region.size, strict=True))
    return whole[slices].clone(memory_format=torch.contiguous_format)


@given(st.data(), shapes)
@settings(max_examples=300, deadline=None)
def test_what_two_regions_share_is_what_both_hold(data: st.DataObject, shape: tuple[int, ...]) -> None:
    one, other = data.draw(regions(shape)), data.draw(regions(shape))
    numbers = torch.arange(1, 1 + math.prod(shape)).view(shape)
    source, target = held(numbers, one), torch.zeros_like(held(numbers, other))
    for theirs, ours in shared(one, other):
        assert not ours.of(target).any()  # nothing is copied twice
        ours.of(target).copy_(theirs.of(source))
    expected = held(numbers, other)
    expected[~torch.isin(expected, source)] = 0
    assert torch.equal(target, expected)


@given(st.data(), shapes)
@settings(max_examples=100, deadline=None)
def test_a_run_is_a_few_boxes(data: st.DataObject, shape: tuple[int, ...]) -> None:
    region = data.draw(regions(shape))
    assert sum(math.prod(box.size) for box in region.boxes()) == region.numel
    assert len(region.boxes()) <= max(1, 2 * len(shape) - 1)
