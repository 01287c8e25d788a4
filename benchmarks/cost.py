"""A cost model of the optimizer step: time, exposed communication and memory of a rank, for any number of ranks.

It runs the real planner and then, chunk by chunk, the loop of ``muon_dist/pipeline.py``: a current stream that
orthogonalises, a side stream that accumulates and applies, and collectives that go out one after the other and take
as long as their slowest rank. Kernels take what benchmarks/README.md measured on one H200; links are given.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from models import Model
from muon_dist.exchange import batch_size
from muon_dist.forecast import forecast
from muon_dist.grouping import assign
from muon_dist.layout import Geometry, wanted_by
from muon_dist.options import DEFAULT_CHUNK_BYTES, MomentumState, Options, Wire
from muon_dist.places import Placed, row_shards
from muon_dist.plan import Chunk, polar_flops
from muon_dist.wire import WireFormat, wire_format

_BF16 = 2  # bytes of a parameter's element, and of its gradient's
_MOMENTS = 8  # bytes of AdamW's two, an element
# Bytes read and written at the owner, an element, to unpack pieces and pack them again: plain numbers are copied, codes
# are decoded to bf16 and encoded from fp16.
_COPY_BYTES = {"fp32": 16, "bf16": 8}
_RECODE_BYTES = 6


@dataclass(frozen=True)
class Machine:
    """FLOPs, bytes and seconds of one GPU and its links."""

    polar_rate: float = 595e12  # FLOP/s of large batches, counted as benchmarks/polar.py counts
    polar_overhead: float = 0.25e-3  # of a batch: what it takes beside its FLOPs
    memory_rate: float = 4.1e12  # bytes read and written by element-wise kernels
    # Host time of a piece under FSDP2, in Python on one CPU core: measured where kernels take many pieces a launch.
    accumulate_host: float = 7e-6
    apply_host: float = 6e-6
    launch_host: float = 60e-6  # and of a chunk's pieces together, for either
    lend_host: float = 4e-6  # of a copy for a replica; estimated
    ranks_per_node: int = 8
    node_rate: float = 350e9  # bytes a second of a GPU in an all-to-all within a node; expected, not measured here
    network_rate: float = 50e9  # and between nodes
    latency: float = 20e-6  # of a collective; estimated
    peer_latency: float = 0.5e-6  # more for each rank in it; estimated


@dataclass(frozen=True)
class Job:
    """A model in bf16 on its ranks: sharded by rows, and with replicas of the shards (HSDP)."""

    model: Model
    ranks: int
    replicas: int = 1
    wire: Wire = "bf16"
    state: MomentumState = "linear8"
    chunk_bytes: int = DEFAULT_CHUNK_BYTES

    @property
    def shards(self) -> int:
        return self.ranks // self.replicas


@dataclass(frozen=True)
class Prediction:
    """Of one step."""

    seconds: float
    exposed: float  # seconds less if collectives took no time
    polar: float  # seconds of the busiest owner
    imbalance: float
    chunks: int
    busy: float  # share of the ranks that own a matrix of a chunk, in the mean over chunks
    memory: float  # bytes on a rank: parameters, gradients, states and the exchange's buffers


@dataclass(frozen=True)
class ChunkCost:
    """Seconds of one chunk on the ranks that take longest; of its polar factors by owner."""

    accumulate: float
    apply: float
    polar: dict[int, float]
    travel: float  # to the owners, and as long back
    lend: float  # copies for the replicas
    spread: float  # to them


def predict(job: Job, machine: Machine) -> Prediction:
    """Plans the job and runs the plan through the model."""
    wire = wire_format(job.wire)
    place = row_shards(job.shards, job.replicas)
    grouping = assign((name, torch.empty(shape, device="meta")) for name, shape in job.model.parameters().items())
    matrices, rest = ([Placed(a, place) for a in grouping if a.algorithm == x] for x in ("muon", "adamw"))
    options = Options(momentum_state=job.state, wire=job.wire, chunk_bytes=job.chunk_bytes)
    found = forecast([matrices], job.ranks, options)
    (plan,) = found.plans
    state = max(found.state)
    elements, others = (sum(math.prod(a.shape) for a, _ in part) for part in (matrices, rest))
    momentum = state / elements * job.ranks
    chunks = [_chunk_cost(chunk, job, momentum, wire, machine) for chunk in plan.chunks]
    adamw = others / job.shards * (3 * _BF16 + 2 * _MOMENTS) / machine.memory_rate
    seconds = _timeline(chunks, adamw, job.ranks)
    hidden = [replace(chunk, travel=0.0, spread=0.0) for chunk in chunks]
    polar: defaultdict[int, float] = defaultdict(float)
    for chunk in chunks:
        for owner, took in chunk.polar.items():
            polar[owner] += took
    return Prediction(
        seconds,
        seconds - _timeline(hidden, adamw, job.ranks),
        max(polar.values()),
        plan.imbalance,
        len(chunks),
        sum(len(chunk.polar) for chunk in chunks) / len(chunks) / job.ranks,
        (elements + others) / job.shards * 2 * _BF16 + state + others / job.shards * _MOMENTS + max(found.buffers),
    )


def batch_seconds(short: int, long: int, count: int, machine: Machine) -> float:
    """Of the polar factors of ``count`` matrices."""
    return count * polar_flops(short, long) / machine.polar_rate + machine.polar_overhead


def _chunk_cost(chunk: Chunk, job: Job, momentum: float, wire: WireFormat, machine: Machine) -> ChunkCost:
    """``momentum`` is in bytes an element."""
    counts: Counter[Geometry] = Counter()
    for bundle in chunk.bundles:
        counts[bundle.geometry] += len(bundle.matrices)
    # The first rank has the largest part of every matrix: rows are cut as torch.chunk cuts them.
    held = wanted = held_pieces = wanted_pieces = wanted_bytes = 0
    for geometry, count in counts.items():
        first = geometry.pieces[0].rect
        mine = wanted_by(0, geometry)
        held += count * first.numel
        held_pieces += count
        wanted_pieces += count * len(mine)
        wanted += count * sum(piece.rect.numel for piece in mine)
        wanted_bytes += count * sum(wire.nbytes(piece.rect.rows, piece.rect.cols) for piece in mine)
    held_bytes = sum(n * wire.nbytes(g.pieces[0].rect.rows, g.pieces[0].rect.cols) for g, n in counts.items())
    polar: defaultdict[int, float] = defaultdict(float)
    owned: Counter[int] = Counter()
    for bundle in chunk.bundles:
        rows, cols, parts = bundle.geometry.rows, bundle.geometry.cols, len(bundle.geometry.pieces)
        short, long = sorted((rows, cols))
        count, batch = len(bundle.matrices), batch_size(bundle.geometry)
        owned[bundle.owner] += count * wire.nbytes(rows, cols)
        polar[bundle.owner] += sum(
            batch_seconds(short, long, min(batch, count - first), machine) for first in range(0, count, batch)
        )
        if parts > 1 or job.wire not in _COPY_BYTES:
            unpack = _COPY_BYTES.get(job.wire, _RECODE_BYTES)
            polar[bundle.owner] += count * rows * cols * unpack / machine.memory_rate
    return ChunkCost(
        accumulate=max(
            (held * (_BF16 + 2 * momentum) + held_bytes) / machine.memory_rate,
            held_pieces * machine.accumulate_host + machine.launch_host,
        ),
        apply=max(
            (wanted * 2 * _BF16 + wanted_bytes) / machine.memory_rate,
            wanted_pieces * machine.apply_host + machine.launch_host,
        ),
        polar=dict(polar),
        travel=_travel(max(held_bytes, *owned.values()), job.ranks, machine) if job.ranks > 1 else 0.0,
        lend=len(chunk.bundles) * job.replicas * machine.lend_host if chunk.spreads else 0.0,
        spread=_spread(wanted_bytes, len(chunk.spreads), job, machine) if chunk.spreads else 0.0,
    )


def _travel(nbytes: float, ranks: int, machine: Machine) -> float:
    """An all-to-all of ``nbytes`` a rank over all ranks: the links within a node and between nodes work abreast."""
    within = min(ranks, machine.ranks_per_node)
    return (
        machine.latency
        + ranks * machine.peer_latency
        + max(
            nbytes * (within - 1) / ranks / machine.node_rate,
            nbytes * (ranks - within) / ranks / machine.network_rate,
        )
    )


def _spread(nbytes: float, parts: int, job: Job, machine: Machine) -> float:
    """From holders to replicas, which lie on other nodes where there are several: each wants ``nbytes``."""
    rate = machine.node_rate if job.ranks <= machine.ranks_per_node else machine.network_rate
    latency = machine.latency + job.ranks * machine.peer_latency
    return parts * latency + nbytes * (1 - 1 / job.replicas) / rate


def _timeline(chunks: Sequence[ChunkCost], adamw: float, ranks: int) -> float:
    """The loop of pipeline.py: seconds until the last chunk is applied."""
    side = chunks[0].accumulate
    network = side + chunks[0].travel
    arriving = network
    current = [adamw] * ranks
    for k, chunk in enumerate(chunks):
        arrived = arriving
        if k + 1 < len(chunks):
            side += chunks[k + 1].accumulate
            network = max(network, side) + chunks[k + 1].travel
            arriving = network
        current = [max(time, arrived) for time in current]
        for owner, seconds in chunk.polar.items():
            current[owner] += seconds
        network = max(network, *current) + chunk.travel
        side = max(side, network) + chunk.lend + chunk.spread
        network = max(network, side)
        side += chunk.apply
    return max(side, *current)
