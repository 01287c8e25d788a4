"""What is forecast from shapes is what a job then keeps, allocates and sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import profile

import muon_dist.pipeline
from muon_dist import DistMuon
from muon_dist.exchange import Buffers, new_buffers
from muon_dist.forecast import forecast
from muon_dist.grouping import assign
from muon_dist.memory import measured_state_bytes
from muon_dist.options import Options
from muon_dist.places import Placed, row_shards
from tests.ranks import run_ranks
from tests.test_sharded import fsdp, hsdp, replicated

# Matrices of several sizes, with and without rows that divide; in several chunks.
SHAPES = {
    "embed_tokens.weight": (300, 96),
    **{f"{i}.up.weight": (320, 96) for i in range(8)},
    **{f"{i}.down.weight": (96, 330) for i in range(8)},
    **{f"{i}.q.weight": (97, 96) for i in range(8)},
    "norm.weight": (96,),
}
CHUNK_BYTES = 65_000  # about a matrix in bf16, two in int8


class Measured(NamedTuple):
    state: int
    buffers: int
    peak: int
    sent: int


def measure(layout: Callable[[Tensor], Tensor], **options: Any) -> Measured:
    """The second step of a job, on this rank."""
    parameters = {name: nn.Parameter(layout(torch.randn(shape))) for name, shape in SHAPES.items()}
    optimizer = DistMuon(list(parameters.items()), chunk_bytes=CHUNK_BYTES, **options)
    buffers: list[int] = []
    sent: list[int] = []

    def watched_buffers(*arguments: Any) -> Buffers:
        made = new_buffers(*arguments)
        buffers.extend({b.data_ptr(): b.nbytes for b in made if b.nbytes}.values())
        return made

    all_to_all = dist.all_to_all_single

    def watched_all_to_all(received: Tensor, given: Tensor, out: list[int], into: list[int], **options: Any) -> Any:
        sent.append(sum(n for peer, n in enumerate(into) if peer != dist.get_rank()))
        return all_to_all(received, given, out, into, **options)

    setattr(muon_dist.pipeline, "new_buffers", watched_buffers)  # noqa: B010
    setattr(dist, "all_to_all_single", watched_all_to_all)  # noqa: B010
    try:
        for _ in range(2):
            buffers.clear()
            sent.clear()
            for p in parameters.values():
                p.grad = torch.randn_like(p)
            with profile(profile_memory=True) as profiler:
                optimizer.step()
    finally:
        setattr(muon_dist.pipeline, "new_buffers", new_buffers)  # noqa: B010
        setattr(dist, "all_to_all_single", all_to_all)  # noqa: B010
    return Measured(measured_state_bytes(optimizer), sum(buffers), peak_bytes(profiler), sum(sent))


def peak_bytes(profiler: Any) -> int:
    """The most that was allocated at a time, above what there was at the start."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        most = max(most, allocated)
    return most


@pytest.mark.parametrize("wire", ["bf16", "int8"])
@pytest.mark.parametrize(
    ("make", "shards", "replicas"),
    [(replicated, 1, 1), (lambda: fsdp(3), 3, 1), (hsdp, 2, 2), (replicated, 1, 2)],
    ids=["single", "fsdp x3", "hsdp 2x2", "ddp x2"],
)
def test_a_step_allocates_and_sends_what_was_forecast(make: Any, shards: int, replicas: int, wire: Any) -> None:
    """State, buffers and bytes sent to the byte, and the peak of a step within 3%, on every rank."""
    ranks = shards * replicas

    def run(_: int) -> Measured:
        if ranks == 1:
            dist.destroy_process_group()
        return measure(make(), wire=wire)

    measured = run_ranks(ranks, run)
    place = row_shards(shards, replicas)
    grouping = assign((name, torch.empty(shape, device="meta")) for name, shape in SHAPES.items())
    options = Options(wire=wire, chunk_bytes=CHUNK_BYTES)
    found = forecast([[Placed(a, place) for a in grouping]], ranks, options, torch.device("cpu"))
    assert len(found.plans[0].chunks) > 1
    assert found.state == tuple(m.state for m in measured)
    assert found.buffers == tuple(m.buffers for m in measured)
    assert found.sent == tuple(m.sent for m in measured)
    assert found.workspace == pytest.approx([m.peak for m in measured], rel=0.03)
