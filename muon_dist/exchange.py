"""The exchange of one chunk: pack, all-to-all, unpack, towards the owners and back.

Pieces go from the ranks that hold them into whole matrices on their owners, and updates come back the same way; where
parameters are replicated, holders then pass their updates on to the ranks that want them, byte for byte, so that
replicas stay identical. Each of these is one uneven ``all_to_all_single`` over bytes; the plan says where each piece
lies. Every rank takes part in every collective, also with nothing to send, so a rank without pieces never holds up
the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from muon_dist.layout import Rect, wanted_by
from muon_dist.plan import Bundle, Chunk, Parcel, Side
from muon_dist.wire import WireFormat

# Elements of the Gram matrices of a batch: bounds the workspace of the polar factor. A batch of 8 with 2048 rows fills
# the chip.
_BATCH_ELEMENTS = 8 * 2048**2


class Buffers(NamedTuple):
    """The memory of a chunk on its way, uint8. Without a group nothing travels, and all are one."""

    held: Tensor
    owned: Tensor
    lent: Tensor
    wanted: Tensor


class PackedPiece(NamedTuple):
    """A piece of the matrix at a position of the plan, in the wire format (uint8)."""

    matrix: int
    rect: Rect
    packed: Tensor


class Exchange:
    """Moves the pieces of one chunk, for one rank.

    Args:
        chunk: what travels.
        wire: as what.
        group: process group of the exchange, or None for a single process, where what is sent is what is received.
    """

    def __init__(self, chunk: Chunk, wire: WireFormat, group: dist.ProcessGroup | None) -> None:
        rank, ranks = (group.rank(), group.size()) if group is not None else (0, 1)
        self._wire = wire
        self._group = group
        self.replicated = chunk.replicated
        self.held = chunk.held(rank, ranks, wire)
        self.owned = chunk.owned(rank, ranks, wire)
        empty = Side((), (0,) * ranks)
        self.lent = chunk.lent(rank, ranks, wire) if self.replicated else empty
        self.wanted = chunk.wanted(rank, ranks, wire) if self.replicated else empty
        kept = {(id(b), p.rect) for b in chunk.bundles for p in wanted_by(rank, b.geometry) if rank in p.kept_by}
        self._kept = [parcel for parcel in self.wanted.parcels if (id(parcel.bundle), parcel.rect) in kept]
        # Looked up once, for all steps: the parcels of each owned bundle, and where each lent parcel's bytes are held.
        self._by_bundle = [
            (bundle, [parcel for parcel in self.owned.parcels if parcel.bundle is bundle])
            for bundle in chunk.bundles
            if bundle.owner == rank
        ]
        held = {(id(parcel.bundle), parcel.rect): parcel for parcel in self.held.parcels}
        self._lent_from = [(parcel, held[id(parcel.bundle), parcel.rect]) for parcel in self.lent.parcels]

    def pack_held(self, pack: Callable[[Sequence[PackedPiece]], None], buffers: Buffers) -> None:
        """Has ``pack`` fill the bytes of all held pieces.

        Pieces that another rank sends for this one are packed where their updates will arrive, only to have their
        momentum updated.
        """
        pack([*_pieces(self.held.parcels, buffers.held), *_pieces(self._kept, buffers.wanted)])

    def gather(self, buffers: Buffers) -> dist.Work | None:
        """Starts the way from the holders to the owners."""
        return self._trade(buffers.held, self.held, buffers.owned, self.owned)

    def replace_owned(self, function: Callable[[Tensor, Tensor | None], Tensor], buffers: Buffers) -> None:
        """Replaces the owned matrices by what ``function`` makes of them.

        It takes ``[n, rows, cols]``, at most about a batch, and where it may put the result, if it can lie in the
        buffer as it is.
        """
        for bundle, parcels in self._by_bundle:
            geometry, frame = bundle.geometry, bundle.geometry.frame
            count = max(1, _BATCH_ELEMENTS // min(geometry.rows, geometry.cols) ** 2)
            for first in range(0, len(bundle.matrices), count):
                rows = [_rows(parcel, buffers.owned)[first : first + count] for parcel in parcels]
                matrices = self._assembled(bundle, parcels, rows).view(-1, geometry.rows, geometry.cols)
                out = self._wire.back.view(rows[0], geometry.rows, geometry.cols) if len(parcels) == 1 else None
                updates = function(matrices, out)
                if updates is out:
                    continue
                updates = updates.reshape(-1, *frame)  # a copy only where runs of a transposed result are cut
                for parcel, packed in zip(parcels, rows, strict=True):
                    self._wire.back.pack(updates[(slice(None), *parcel.rect.slices)], packed)

    def scatter(self, buffers: Buffers) -> dist.Work | None:
        """Starts the way from the owners back to the holders."""
        return self._trade(buffers.owned, self.owned, buffers.held, self.held)

    def spread(self, buffers: Buffers) -> dist.Work | None:
        """Starts the way from the holders to all replicas; None where there are no others."""
        if not self.replicated or self._group is None:
            return None
        for lent, held in self._lent_from:
            _rows(lent, buffers.lent).copy_(_rows(held, buffers.held))
        return self._trade(buffers.lent, self.lent, buffers.wanted, self.wanted)

    def unpack_updates(self, apply: Callable[[Sequence[PackedPiece]], None], buffers: Buffers) -> None:
        """Has ``apply`` read the bytes of all pieces that this rank wants."""
        spread = self.replicated and self._group is not None
        side, buffer = (self.wanted, buffers.wanted) if spread else (self.held, buffers.held)
        apply(list(_pieces(side.parcels, buffer)))

    def _assembled(self, bundle: Bundle, parcels: Sequence[Parcel], rows: Sequence[Tensor]) -> Tensor:
        """Whole matrices, ``[n, *frame]``, from the bytes of their pieces; those in one piece are not copied."""
        pieces = [(p.rect, self._wire.unpack(r, p.rect.rows, p.rect.cols)) for p, r in zip(parcels, rows, strict=True)]
        if len(pieces) == 1:
            return pieces[0][1]
        stack = pieces[0][1].new_empty((len(rows[0]), *bundle.geometry.frame))
        for rect, piece in pieces:
            stack[(slice(None), *rect.slices)] = piece
        return stack

    def _trade(self, sent: Tensor, sender: Side, received: Tensor, receiver: Side) -> dist.Work | None:
        if self._group is None:
            return None
        work: dist.Work = dist.all_to_all_single(
            received[: receiver.nbytes],
            sent[: sender.nbytes],
            list(receiver.splits),
            list(sender.splits),
            group=self._group,
            async_op=True,
        )
        return work


def new_buffers(exchanges: Sequence[Exchange], group: dist.ProcessGroup | None, device: torch.device) -> Buffers:
    """Buffers that are large enough for any of ``exchanges``."""

    def largest(side: Callable[[Exchange], Side]) -> Tensor:
        return torch.empty(max(side(exchange).nbytes for exchange in exchanges), dtype=torch.uint8, device=device)

    held = largest(lambda exchange: exchange.held)
    if group is None:
        return Buffers(held, held, held, held)
    return Buffers(held, *(largest(side) for side in (lambda e: e.owned, lambda e: e.lent, lambda e: e.wanted)))


def _pieces(parcels: Iterable[Parcel], buffer: Tensor) -> Iterator[PackedPiece]:
    for parcel in parcels:
        for matrix, packed in zip(parcel.bundle.matrices, _rows(parcel, buffer), strict=True):
            yield PackedPiece(matrix, parcel.rect, packed)


def _rows(parcel: Parcel, buffer: Tensor) -> Tensor:
    """The bytes of a parcel as ``[n, nbytes]``, a row a matrix."""
    n = len(parcel.bundle.matrices)
    return buffer[parcel.offset : parcel.offset + n * parcel.nbytes].view(n, parcel.nbytes)
