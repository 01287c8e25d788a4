"""The plan of a step: an owner for every matrix, chunks of bounded size, and the bytes that travel. Pure Python.

Every rank computes the same plan from the same matrices, so nothing has to be agreed at run time but that the inputs
were the same (:mod:`muon_dist.agreement`).

Owners: longest processing time first. Matrices are taken in descending FLOPs; each goes to the rank with the least work
so far, or to the rank that already holds most of it, so that less travels, while that keeps the work balanced. Chunks:
every owner's matrices in the same order, all owners abreast by FLOPs, cut where a rank's buffers would grow over the
limit. The largest come first, so that the return trip of the last chunk, which nothing hides, is small.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from typing import NamedTuple

from muon_dist.layout import Geometry, Matrix, Piece, Rect, held_by, wanted_by
from muon_dist.wire import WireFormat

# How much more than the mean a rank may do for the sake of matrices that then need not travel.
_MAX_IMBALANCE = 1.05
# Of a matrix with more holders only the fullest is counted, as if all ranks held as much: with row shards the first
# rank does.
_FEW_HOLDERS = 64


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


class Side(NamedTuple):
    """One rank's side of an exchange: its buffer, ordered by the rank at the other end, and the bytes for each rank."""

    parcels: tuple[Parcel, ...]
    splits: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return sum(self.splits)


class Spread(NamedTuple):
    """Bundles whose updates spread to replicas together: from each rank's ``lent`` to the ``wanted`` of others."""

    bundles: tuple[Bundle, ...]

    def lent(self, rank: int, ranks: int, wire: WireFormat) -> Side:
        """The rank's pieces, once for each rank that wants them, ordered by those ranks."""
        held = ((b, p) for b in self.bundles for p in held_by(rank, b.geometry))
        return _side([(to, b, p) for b, p in held for to in p.wanted_by], ranks, wire)

    def wanted(self, rank: int, ranks: int, wire: WireFormat) -> Side:
        """The pieces that the rank wants, ordered by their holders."""
        return _side([(p.rank, b, p) for b in self.bundles for p in wanted_by(rank, b.geometry)], ranks, wire)


@dataclass(frozen=True)
class Chunk:
    """Matrices that travel together.

    Gathering goes from each rank's ``held`` to the ``owned`` of others, scattering back the same way. Where
    parameters are replicated, the updates then spread, a part of the chunk after the other: replicas want many times
    what they hold. Both ends of an exchange walk the bundles in the same order, so their buffers agree.
    """

    bundles: tuple[Bundle, ...]
    spreads: tuple[Spread, ...]  # none where every piece is wanted by its holder alone

    def held(self, rank: int, ranks: int, wire: WireFormat) -> Side:
        """The rank's pieces, ordered by their owners."""
        return _side([(b.owner, b, p) for b in self.bundles for p in held_by(rank, b.geometry)], ranks, wire)

    def owned(self, rank: int, ranks: int, wire: WireFormat) -> Side:
        """All pieces of the matrices that the rank owns, ordered by their holders."""
        return _side([(p.rank, b, p) for b in self.bundles if b.owner == rank for p in b.geometry.pieces], ranks, wire)


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


def polar_flops(rows: int, cols: int) -> int:
    """FLOPs of one polar factor with the coefficients that are the default, symmetric products counted by half."""
    short, long = sorted((rows, cols))
    return min(6 * short**2 * long + 9 * short**3, 3 * short**2 * long + 17 * short**3)


def make_plan(matrices: Sequence[Matrix], ranks: int, wire: WireFormat, chunk_bytes: int) -> Plan:
    """Assigns owners and cuts chunks.

    Args:
        matrices: all matrices of one process group, the same list on every rank.
        ranks: size of the process group.
        wire: what the bytes are counted in.
        chunk_bytes: bound on each buffer of a chunk on any rank. A matrix that is larger sets the bound itself: its
            owner's buffer has to hold it, and the others may then hold as much.
    """
    costs = [polar_flops(m.geometry.rows, m.geometry.cols) for m in matrices]
    geometries = sorted({m.geometry for m in matrices})
    places = {geometry: place for place, geometry in enumerate(geometries)}
    # Equal geometries stay together among equal costs, to be batched; the last first, whose gradients come first.
    order = sorted(range(len(matrices)), key=lambda i: (-costs[i], places[matrices[i].geometry], -i))
    fair = _MAX_IMBALANCE * sum(costs) / ranks
    owners = [0] * len(matrices)
    before = [0] * len(matrices)  # FLOPs of its owner's until it is its turn
    loads = [0] * ranks
    lightest = [(0, rank) for rank in range(ranks)]  # a heap; entries that are no rank's load any more are left in it
    for i in order:
        owner = matrices[i].geometry.main_holder
        if owner is None or loads[owner] + costs[i] > fair:
            while lightest[0][0] != loads[lightest[0][1]]:
                heappop(lightest)
            owner = lightest[0][1]
        owners[i], before[i] = owner, loads[owner]
        loads[owner] += costs[i]
        heappush(lightest, (loads[owner], owner))
    sizes = {geometry: _Size.of(geometry, ranks, wire) for geometry in geometries}
    limit = max([chunk_bytes, *(size.owner for size in sizes.values())])
    chunks: list[Chunk] = []
    pending: list[int] = []
    filled = _Fill(ranks)
    for i in sorted(order, key=before.__getitem__):
        size = sizes[matrices[i].geometry]
        if pending and filled.after(owners[i], size) > limit:
            chunks.append(_chunk(pending, owners, matrices, sizes, limit))
            pending, filled = [], _Fill(ranks)
        pending.append(i)
        filled.add(owners[i], size)
    if pending:
        chunks.append(_chunk(pending, owners, matrices, sizes, limit))
    return Plan(ranks, tuple(matrices), tuple(owners), tuple(chunks))


class _Size(NamedTuple):
    """Bytes of one matrix in the buffers of the ranks that it touches."""

    owner: int  # at its owner: all its pieces
    everywhere: int  # where many ranks hold a piece: the most of any of them
    holders: dict[int, int]  # where few do: of each
    replica: int  # the most that a rank wants of it

    @classmethod
    def of(cls, geometry: Geometry, ranks: int, wire: WireFormat) -> _Size:
        holders: dict[int, int] = {}
        replicas: dict[int, int] = {}  # by the first of those that want the same pieces
        for piece in geometry.pieces:
            nbytes = wire.nbytes(piece.rect.rows, piece.rect.cols)
            holders[piece.rank] = holders.get(piece.rank, 0) + nbytes
            replicas[piece.wanted_by[0]] = replicas.get(piece.wanted_by[0], 0) + nbytes
        owner = sum(holders.values())
        most, replica = (max(sizes.values(), default=0) for sizes in (holders, replicas))
        if len(holders) > min(ranks // 2, _FEW_HOLDERS):
            return cls(owner, most, {}, replica)
        return cls(owner, 0, holders, replica)


class _Fill:
    """How full a chunk's buffers are: each owner's, and each holder's."""

    def __init__(self, ranks: int) -> None:
        self.owners = [0] * ranks
        self.everywhere = 0
        self.holders = [0] * ranks
        self.fullest = 0  # of the holders

    def add(self, owner: int, size: _Size) -> None:
        self.owners[owner] += size.owner
        self.everywhere += size.everywhere
        for rank, nbytes in size.holders.items():
            self.holders[rank] += nbytes
            self.fullest = max(self.fullest, self.holders[rank])

    def after(self, owner: int, size: _Size) -> int:
        """Bytes of the fullest buffer if one more matrix came."""
        fullest = max((self.holders[rank] + nbytes for rank, nbytes in size.holders.items()), default=0)
        held = self.everywhere + size.everywhere + max(self.fullest, fullest)
        return max(self.owners[owner] + size.owner, held)


def _chunk(
    members: Sequence[int],
    owners: Sequence[int],
    matrices: Sequence[Matrix],
    sizes: Mapping[Geometry, _Size],
    limit: int,
) -> Chunk:
    found: dict[tuple[int, Geometry], list[int]] = {}
    for i in members:
        found.setdefault((owners[i], matrices[i].geometry), []).append(i)
    bundles = tuple(Bundle(owner, geometry, tuple(together)) for (owner, geometry), together in found.items())
    if not any(bundle.geometry.replicated for bundle in bundles):
        return Chunk(bundles, ())
    spreads: list[Spread] = []
    pending: list[Bundle] = []
    filled = 0
    for bundle in bundles:
        size = sizes[bundle.geometry].replica * len(bundle.matrices)  # at most what its owner holds
        if pending and filled + size > limit:
            spreads.append(Spread(tuple(pending)))
            pending, filled = [], 0
        pending.append(bundle)
        filled += size
    return Chunk(bundles, (*spreads, Spread(tuple(pending))))


def _side(pieces: Iterable[tuple[int, Bundle, Piece]], ranks: int, wire: WireFormat) -> Side:
    """Places pieces, given with the rank at the other end, in a buffer ordered by that rank."""
    parcels = []
    splits = [0] * ranks
    offset = 0
    for peer, bundle, piece in sorted(pieces, key=lambda item: item[0]):
        nbytes = wire.nbytes(piece.rect.rows, piece.rect.cols)
        parcels.append(Parcel(bundle, piece.rect, offset, nbytes))
        offset += nbytes * len(bundle.matrices)
        splits[peer] += nbytes * len(bundle.matrices)
    return Side(tuple(parcels), tuple(splits))
