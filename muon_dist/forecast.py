"""What DistMuon will cost on every rank of a job that does not run yet: bytes it keeps, bytes it needs for a step,
bytes that travel, FLOPs.

It asks the planner that the step asks. docs/estimate.md says what is counted and how well it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from muon_dist.layout import Matrix
from muon_dist.loads import PolarMemory, loads_of
from muon_dist.memory import state_bytes_by_rank
from muon_dist.options import Options
from muon_dist.places import Placed
from muon_dist.plan import Plan, make_plan
from muon_dist.polar import schedule
from muon_dist.wire import wire_format


@dataclass(frozen=True)
class Forecast:
    """Of each rank.

    Attributes:
        state: bytes that are kept between steps.
        offloaded: how many of these are momentum in memory of the host; a step reads and writes them over the bus.
        buffers: bytes of the exchange's buffers; they live for a step.
        polar: bytes of the largest batch of polar factors, beside the buffers.
        sent: bytes that go to other ranks in a step.
        flops: of polar factors in a step.
        plans: one for each call of ``step()`` that has matrices.
    """

    state: tuple[int, ...]
    offloaded: tuple[int, ...]
    buffers: tuple[int, ...]
    polar: tuple[int, ...]
    sent: tuple[int, ...]
    flops: tuple[int, ...]
    plans: tuple[Plan, ...]

    @property
    def workspace(self) -> tuple[int, ...]:
        """Bytes that a step needs and gives back."""
        return tuple(a + b for a, b in zip(self.buffers, self.polar, strict=True))


def forecast(
    calls: Sequence[Sequence[Placed]], ranks: int, options: Options, device: torch.device | None = None
) -> Forecast:
    """Plans a job of the ranks 0 to ``ranks - 1``.

    Args:
        calls: the parameters, by the call of ``step()`` that updates them: one call, or as many as an engine makes. All
            parameters lie on all ranks.
        options: as the optimizer will be given.
        device: where it will run; a CUDA device if None. The dtype of the iteration depends on it, and whether momentum
            can be offloaded.
    """
    device = device or torch.device("cuda")
    wire = wire_format(options.wire)
    coefficients = schedule(options.polar, options.polar_steps)
    memory = PolarMemory.of(coefficients, options.polar_form, options.polar_dtype, device)
    plans = []
    for call in calls:
        matrices = [
            Matrix(a.name, geometry)
            for turn, (a, place) in enumerate(call)
            if a.form
            for geometry in place.geometries(a.form, turn)
        ]
        if matrices:
            plans.append(make_plan(matrices, ranks, wire, options.chunk_bytes))
    loads = [loads_of(plan, wire, memory) for plan in plans]
    parameters = [placed for call in calls for placed in call]
    offloads = options.offload_momentum and device.type == "cuda"
    offloaded = [placed for placed in parameters if offloads and placed.assignment.form]
    return Forecast(
        tuple(state_bytes_by_rank(parameters, ranks, options)),
        tuple(state_bytes_by_rank(offloaded, ranks, options)),
        _each_rank(max, ranks, (load.buffers for load in loads)),
        _each_rank(max, ranks, (load.polar for load in loads)),
        _each_rank(sum, ranks, (load.sent for load in loads)),
        _each_rank(sum, ranks, (load.flops for load in loads)),
        tuple(plans),
    )


def _each_rank(combine: Callable[[Iterable[int]], int], ranks: int, calls: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """``combine`` of what all calls ask of a rank, which is nothing if there are none."""
    return tuple(combine(asked) for asked in zip([0] * ranks, *calls, strict=True))
