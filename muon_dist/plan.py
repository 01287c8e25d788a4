"""The plan of a step: an owner for every matrix, chunks of bounded size, and the bytes that travel. Pure Python.

Every rank computes the same plan from the same matrices, so nothing has to be agreed at run time but that the inputs
were the same (:func:`Plan.digest`).

Owners: longest processing time first. Matrices are taken in descending FLOPs, each goes to the rank with the least
    work so far.
Chunks: the same order, cut where a rank's buffers would grow over the limit. The largest come first, so that the
    return trip of the last chunk, which nothing hides, is small.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from muon_dist.layout import Geometry, Matrix, Piece, Rect
from muon_dist.wire import WireFormat


class Bundle(NamedTuple):
    """Matrices of one geometry with one owner in one chunk: they travel side by side and make one batch."""

    owner: int
    geometry: Geometry
    matrices: tuple[int, ...]  # positions in Plan.matrices


class Parcel(NamedTuple):
    """One piece of each matrix of a bundle, packed one after the other in a buffer."""

    bundle: Bundle
    rect: Rect
    offset: int  # bytes from the start of the buffer
    nbytes: int  # of one matrix's piece


class Leg(NamedTuple):
    """One direction of a chunk's exchange, as one rank sees it.

    On the holder's side of an exchange lie this rank's pieces, ordered by their owners; on the owner's side the
    pieces of the matrices that this rank owns, ordered by the ranks that hold (or want) them. Gathering sends from
    the first to the second, scattering from the second to the first.
    """

    holder: tuple[Parcel, ...]
    holder_splits: tuple[int, ...]  # bytes for each rank
    owner: tuple[Parcel, ...]
    owner_splits: tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """Matrices that travel together."""

    bundles: tuple[Bundle, ...]

    def gather(self, rank: int, ranks: int, wire: WireFormat) -> Leg:
        """The way to the owners, of the pieces that ranks hold."""
        return _leg(self.bundles, rank, ranks, wire, lambda geometry: geometry.held)

    def scatter(self, rank: int, ranks: int, wire: WireFormat) -> Leg:
        """The way back, of the pieces that ranks want."""
        return _leg(self.bundles, rank, ranks, wire, lambda geometry: geometry.wanted)


@dataclass(frozen=True)
class Plan:
    """Who orthogonalises what, and when."""

    ranks: int
    matrices: tuple[Matrix, ...]
    owners: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @cached_property
    def flops(self) -> tuple[int, ...]:
        """FLOPs of the polar factor on each rank."""
        loads = [0] * self.ranks
        for matrix, owner in zip(self.matrices, self.owners, strict=True):
            loads[owner] += polar_flops(matrix.geometry.rows, matrix.geometry.cols)
        return tuple(loads)

    @property
    def imbalance(self) -> float:
        """Work of the busiest rank over the mean: 1 is perfect."""
        return max(self.flops) * self.ranks / sum(self.flops) if sum(self.flops) else 1.0

    def digest(self) -> str:
        """A fingerprint of everything in the plan."""
        return hashlib.sha256(repr((self.ranks, self.matrices, self.owners)).encode()).hexdigest()


def polar_flops(rows: int, cols: int) -> int:
    """FLOPs of one polar factor in the Gram form with symmetric products, five iterations and one restart."""
    short, long = sorted((rows, cols))
    return 6 * short**2 * long + 14 * short**3


def make_plan(matrices: Sequence[Matrix], ranks: int, wire: WireFormat, chunk_bytes: int) -> Plan:
    """Assigns owners and cuts chunks.

    Args:
        matrices: all matrices of one process group, the same list on every rank.
        ranks: size of the process group.
        wire: what the bytes are counted in.
        chunk_bytes: bound on each buffer of a chunk on any rank. A matrix larger than this is a chunk of its own.
    """
    costs = [polar_flops(m.geometry.rows, m.geometry.cols) for m in matrices]
    # Equal geometries stay together among equal costs, to be batched.
    order = sorted(range(len(matrices)), key=lambda i: (-costs[i], matrices[i].geometry, i))
    owners = [0] * len(matrices)
    loads = [0] * ranks
    chunks: list[Chunk] = []
    pending: list[int] = []
    filled = _Fill(ranks)
    for i in order:
        owner = loads.index(min(loads))
        size = _Size.of(matrices[i].geometry, wire)
        if pending and filled.after(owner, size) > chunk_bytes:
            chunks.append(_chunk(pending, owners, matrices))
            pending, filled = [], _Fill(ranks)
        owners[i] = owner
        loads[owner] += costs[i]
        pending.append(i)
        filled.add(owner, size)
    if pending:
        chunks.append(_chunk(pending, owners, matrices))
    return Plan(ranks, tuple(matrices), tuple(owners), tuple(chunks))


class _Size(NamedTuple):
    """Bytes of one matrix in the buffers of the ranks that it touches."""

    owner: int  # at its owner: all pieces, the larger of the two directions
    holder: int  # at a holder: its largest piece, the larger of the two directions

    @classmethod
    def of(cls, geometry: Geometry, wire: WireFormat) -> _Size:
        held = [wire.nbytes(p.rect.rows, p.rect.cols) for p in geometry.held]
        wanted = [wire.nbytes(p.rect.rows, p.rect.cols) for p in geometry.wanted]
        return cls(max(sum(held), sum(wanted)), max(held + wanted, default=0))


class _Fill:
    """How full a chunk's buffers are: each owner's, and the fullest holder's."""

    def __init__(self, ranks: int) -> None:
        self.owners = [0] * ranks
        self.holder = 0

    def add(self, owner: int, size: _Size) -> None:
        self.owners[owner] += size.owner
        self.holder += size.holder

    def after(self, owner: int, size: _Size) -> int:
        """Bytes of the fullest buffer if one more matrix came."""
        return max(self.owners[owner] + size.owner, self.holder + size.holder)


def _chunk(members: Sequence[int], owners: Sequence[int], matrices: Sequence[Matrix]) -> Chunk:
    bundles: dict[tuple[int, Geometry], list[int]] = {}
    for i in members:
        bundles.setdefault((owners[i], matrices[i].geometry), []).append(i)
    return Chunk(tuple(Bundle(owner, geometry, tuple(found)) for (owner, geometry), found in bundles.items()))


def _leg(
    bundles: Sequence[Bundle],
    rank: int,
    ranks: int,
    wire: WireFormat,
    pieces_of: Callable[[Geometry], tuple[Piece, ...]],
) -> Leg:
    """Both sides of one direction. Sender and receiver walk the bundles in the same order, so their buffers agree."""
    mine = [(b.owner, b, p) for b in bundles for p in pieces_of(b.geometry) if p.rank == rank]
    owned = [(p.rank, b, p) for b in bundles if b.owner == rank for p in pieces_of(b.geometry)]
    return Leg(*_lay_out(mine, ranks, wire), *_lay_out(owned, ranks, wire))


def _lay_out(
    pieces: Sequence[tuple[int, Bundle, Piece]], ranks: int, wire: WireFormat
) -> tuple[tuple[Parcel, ...], tuple[int, ...]]:
    """Places pieces, given with the rank at the other end, in a buffer ordered by that rank."""
    parcels = []
    splits = [0] * ranks
    offset = 0
    for peer, bundle, piece in sorted(pieces, key=lambda item: item[0]):
        nbytes = wire.nbytes(piece.rect.rows, piece.rect.cols)
        parcels.append(Parcel(bundle, piece.rect, offset, nbytes))
        offset += nbytes * len(bundle.matrices)
        splits[peer] += nbytes * len(bundle.matrices)
    return tuple(parcels), tuple(splits)
