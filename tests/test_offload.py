"""Offloaded momentum, as far as it can be seen without a GPU; tests/test_cuda.py has the steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muon_dist import DistMuon
from muon_dist.checkpoint import load_state, save_state
from muon_dist.forecast import forecast
from muon_dist.forms import Form
from muon_dist.grouping import assign
from muon_dist.memory import measured_state_bytes
from muon_dist.options import Options
from muon_dist.places import Placed, row_shards
from muon_dist.state import MOMENTUM, flat_layout, moments_of, momentum_of
from muon_dist.state_dict import loaded

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPES = {"embed_tokens.weight": (100, 64), "up.weight": (96, 64), "down.weight": (64, 97), "norm.weight": (64,)}


def train(offload: bool, momentum_state: Any, folder: Path) -> Iterator[Tensor]:
    """Weights and state of a run that saves its state and loads it, portable and not."""
    generator = torch.Generator().manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    optimizer = DistMuon(list(parameters.items()), momentum_state=momentum_state, offload_momentum=offload)
    for step in range(3):
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        save_state(optimizer, folder / f"{step}")
        load_state(optimizer, folder / f"{step}")
        optimizer.load_state_dict(optimizer.state_dict())
    yield from (p.detach() for p in parameters.values())
    yield from (t for entries in optimizer.state.values() for t in entries.values())


def test_it_changes_nothing_on_a_cpu(tmp_path: Path) -> None:
    runs = [train(offload, "lowrank4", tmp_path / str(offload)) for offload in (False, True)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*runs, strict=True))


def test_momentum_of_a_parameter_on_a_gpu_lies_on_the_host_and_nothing_else() -> None:
    options = Options(offload_momentum=True)
    on_gpu, on_cpu = (flat_layout((8, 16), 0, 128, 16, device, Form((1, 8, 16), (8,))) for device in (CUDA, CPU))
    layouts = [
        momentum_of(on_gpu, options).layout,
        momentum_of(on_cpu, options).layout,
        momentum_of(on_gpu, Options()).layout,
        *(moment.layout for moment in moments_of((8, 16), on_gpu, options)),
    ]
    places = [(CPU, True), (CPU, False), (CUDA, False), (CUDA, False), (CUDA, False)]
    assert [(layout.device, layout.pinned) for layout in layouts] == places


def test_a_state_is_loaded_into_page_locked_memory_where_there_is_some() -> None:
    place, value = torch.zeros(4), torch.arange(4.0)
    assert loaded(value, CPU, place) is place
    assert torch.equal(place, value)
    assert torch.equal(loaded(value, CPU, None), value)


def test_a_forecast_counts_it_apart() -> None:
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    optimizer = DistMuon(list(parameters.items()))
    state = optimizer.state_dict()["state"].values()
    momentum = sum(t.nbytes for entries in state for label, t in entries.items() if label.startswith(MOMENTUM))
    calls = [[Placed(a, row_shards(1)) for a in assign(parameters.items())]]
    for device, expected in ((CUDA, momentum), (CPU, 0)):
        found = forecast(calls, 1, Options(offload_momentum=True), device)
        assert (found.state, found.offloaded) == ((measured_state_bytes(optimizer),), (expected,))
