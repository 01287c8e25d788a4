"""What a plan asks of every rank in a step: bytes of buffers, of polar factors, and on the wire; FLOPs.

Counted from the plan alone, for all ranks at once. Matrices of one geometry ask the same of a holder, and there are few
geometries, so ranks are walked once a chunk and geometry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from muon_dist.exchange import assembled, batch_size, in_place
from muon_dist.layout import Geometry
from muon_dist.options import PolarForm
from muon_dist.pipeline import SLOTS
from muon_dist.plan import Bundle, Chunk, Plan
from muon_dist.polar import Schedule, default_dtype, workspace_elements
from muon_dist.strips import strips
from muon_dist.wire import WireFormat


@dataclass(frozen=True)
class Loads:
    """Of each rank, in its order in the plan.

    Attributes:
        buffers: bytes of the exchange's buffers, to the byte.
        polar: bytes that the largest batch of polar factors needs beside them.
        sent: bytes that go to other ranks in a step.
        flops: of polar factors in a step.
    """

    buffers: tuple[int, ...]
    polar: tuple[int, ...]
    sent: tuple[int, ...]
    flops: tuple[int, ...]


@dataclass(frozen=True)
class PolarMemory:
    """How polar factors are computed, as far as their memory depends on it."""

    schedule: Schedule
    form: PolarForm
    dtype: torch.dtype

    @classmethod
    def of(cls, schedule: Schedule, form: PolarForm, dtype: torch.dtype | None, device: torch.device) -> PolarMemory:
        return cls(schedule, form, dtype or default_dtype(device))


def loads_of(plan: Plan, wire: WireFormat, polar: PolarMemory) -> Loads:
    """Of all ranks of ``plan``."""
    ranks = plan.ranks
    shares = {geometry: _Share.of(geometry, ranks, wire) for geometry in {m.geometry for m in plan.matrices}}
    most = {buffer: torch.zeros(ranks, dtype=torch.int64) for buffer in ("held", "owned", "lent", "wanted")}
    sent = torch.zeros(ranks, dtype=torch.int64)

    def filled(buffer: str, nbytes: Tensor) -> None:
        torch.maximum(most[buffer], nbytes, out=most[buffer])

    for chunk in plan.chunks:
        held = _total(chunk.bundles, shares, "held", ranks)
        owned, kept = [0] * ranks, [0] * ranks
        for bundle in chunk.bundles:
            share = shares[bundle.geometry]
            owned[bundle.owner] += len(bundle.matrices) * share.whole
            kept[bundle.owner] += len(bundle.matrices) * int(share.held[bundle.owner])
        filled("held", held)
        if ranks > 1:  # else the buffers are one
            filled("owned", torch.tensor(owned))
            sent += held + torch.tensor(owned) - 2 * torch.tensor(kept)
            for spread in chunk.spreads:
                lent = _total(spread.bundles, shares, "lent", ranks)
                filled("lent", lent)
                filled("wanted", _total(spread.bundles, shares, "wanted", ranks))
                sent += lent - _total(spread.bundles, shares, "own", ranks)
    buffers = min(SLOTS, len(plan.chunks)) * sum(most.values(), torch.zeros(ranks, dtype=torch.int64))
    return Loads(tuple(buffers.tolist()), _polar(plan, wire, polar), tuple(sent.tolist()), plan.flops)


@dataclass(frozen=True)
class _Share:
    """Bytes of one matrix on each rank, int64 ``[ranks]``: of the pieces that it holds, lends to those that want them,
    wants, and both holds and wants."""

    whole: int
    held: Tensor
    lent: Tensor
    wanted: Tensor
    own: Tensor

    @classmethod
    def of(cls, geometry: Geometry, ranks: int, wire: WireFormat) -> _Share:
        held, lent, wanted, own = ([0] * ranks for _ in range(4))
        for piece in geometry.pieces:
            nbytes = wire.nbytes(piece.rect.rows, piece.rect.cols)
            held[piece.rank] += nbytes
            lent[piece.rank] += nbytes * len(piece.wanted_by)
            for rank in piece.wanted_by:
                wanted[rank] += nbytes
            own[piece.rank] += nbytes * (piece.rank in piece.wanted_by)
        return cls(sum(held), *(torch.tensor(each) for each in (held, lent, wanted, own)))


def _total(bundles: Iterable[Bundle], shares: dict[Geometry, _Share], side: str, ranks: int) -> Tensor:
    counts: Counter[Geometry] = Counter()
    for bundle in bundles:
        counts[bundle.geometry] += len(bundle.matrices)
    parts = (count * getattr(shares[geometry], side) for geometry, count in counts.items())
    return sum(parts, torch.zeros(ranks, dtype=torch.int64))


def _polar(plan: Plan, wire: WireFormat, polar: PolarMemory) -> tuple[int, ...]:
    most = [0] * plan.ranks
    known: dict[tuple[Geometry, int], int] = {}
    for chunk in plan.chunks:
        for bundle in chunk.bundles:
            alike = (bundle.geometry, len(bundle.matrices))
            if alike not in known:
                known[alike] = _of_batch(bundle, chunk, plan.ranks, wire, polar)
            most[bundle.owner] = max(most[bundle.owner], known[alike])
    return tuple(most)


def _of_batch(bundle: Bundle, chunk: Chunk, ranks: int, wire: WireFormat, polar: PolarMemory) -> int:
    """Bytes of one batch of the bundle: whole matrices where they do not lie in the buffer as they are, results where
    they cannot be written there, and what the iteration needs. The exchange itself runs, on the meta device."""
    owned = chunk.owned(bundle.owner, ranks, wire)
    parts = strips([parcel for parcel in owned.parcels if parcel.bundle is bundle])
    buffer = torch.empty(owned.nbytes, dtype=torch.uint8, device="meta")
    geometry = bundle.geometry
    count = min(len(bundle.matrices), batch_size(geometry))
    packed = [strip.in_buffer(buffer, 0, count) for strip in parts]
    matrices = assembled(wire, geometry.frame, parts, packed)
    out = in_place(wire.back, geometry.frame, parts, packed)
    elements = count * workspace_elements(geometry.rows, geometry.cols, polar.schedule, polar.form, polar.dtype)
    if out is None or out.dtype != polar.dtype:
        elements += count * geometry.rows * geometry.cols
    copied = matrices.untyped_storage() is not buffer.untyped_storage()
    return elements * polar.dtype.itemsize + (matrices.nbytes if copied else 0)
