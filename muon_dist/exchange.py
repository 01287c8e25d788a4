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

from muon_dist.layout import Geometry, Rect, wanted_by
from muon_dist.plan import Chunk, Parcel, Side
from muon_dist.strips import Strip, strips
from muon_dist.wire import WireFormat

# Elements of the Gram matrices of a batch: bounds the workspace of the polar factor. A batch of 8 with 2048 rows fills
# the chip.
BATCH_ELEMENTS = 8 * 2048**2


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
        self.held = chunk.held(rank, ranks, wire)
        self.owned = chunk.owned(rank, ranks, wire)
        spreads = chunk.spreads if group is not None else ()
        self.lent = [spread.lent(rank, ranks, wire) for spread in spreads]
        self.wanted = [spread.wanted(rank, ranks, wire) for spread in spreads]
        kept = {(id(b), p.rect) for b in chunk.bundles for p in wanted_by(rank, b.geometry) if rank in p.kept_by}
        wanted = [parcel for side in self.wanted for parcel in side.parcels]
        self._kept = [parcel for parcel in wanted if (id(parcel.bundle), parcel.rect) in kept]
        # Looked up once, for all steps: the pieces of each owned bundle, and where each lent parcel's bytes are held.
        by_bundle: dict[int, list[Parcel]] = {}
        for parcel in self.owned.parcels:
            by_bundle.setdefault(id(parcel.bundle), []).append(parcel)
        self._owned = [(parcels[0].bundle, strips(parcels)) for parcels in by_bundle.values()]
        held = {(id(parcel.bundle), parcel.rect): parcel for parcel in self.held.parcels}
        self._lent_from = [[(p, held[id(p.bundle), p.rect]) for p in side.parcels] for side in self.lent]

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
        for bundle, parts in self._owned:
            geometry, frame = bundle.geometry, bundle.geometry.frame
            count = batch_size(geometry)
            for start in range(0, len(bundle.matrices), count):
                stop = min(start + count, len(bundle.matrices))
                packed = [strip.in_buffer(buffers.owned, start, stop) for strip in parts]
                matrices = assembled(self._wire, frame, parts, packed).view(-1, geometry.rows, geometry.cols)
                there = in_place(self._wire.back, frame, parts, packed)
                out = None if there is None else there.view(matrices.shape)
                updates = function(matrices, out)
                if updates is out:
                    continue
                updates = updates.reshape(-1, *frame)  # a copy only where runs of a transposed result are cut
                for strip, nbytes in zip(parts, packed, strict=True):
                    self._wire.back.pack(strip.of_whole(updates), nbytes)

    def scatter(self, buffers: Buffers) -> dist.Work | None:
        """Starts the way from the owners back to the holders."""
        return self._trade(buffers.owned, self.owned, buffers.held, self.held)

    def apply_updates(self, apply: Callable[[Sequence[PackedPiece]], None], buffers: Buffers) -> None:
        """Has ``apply`` read the bytes of all pieces that this rank wants; from replicas they come part by part."""
        if not self.wanted:
            apply(list(_pieces(self.held.parcels, buffers.held)))
        for lent, wanted, lent_from in zip(self.lent, self.wanted, self._lent_from, strict=True):
            if lent_from:
                targets, sources = zip(
                    *((_rows(p, buffers.lent), _rows(h, buffers.held)) for p, h in lent_from), strict=True
                )
                torch._foreach_copy_(targets, sources)  # many small copies in few launches
            if spreading := self._trade(buffers.lent, lent, buffers.wanted, wanted):
                spreading.wait()
            apply(list(_pieces(wanted.parcels, buffers.wanted)))

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

    def buffer(sides: Iterable[Side]) -> Tensor:
        return torch.empty(max((side.nbytes for side in sides), default=0), dtype=torch.uint8, device=device)

    held = buffer(exchange.held for exchange in exchanges)
    if group is None:
        return Buffers(held, held, held, held)
    owned = buffer(exchange.owned for exchange in exchanges)
    lent = buffer(side for exchange in exchanges for side in exchange.lent)
    return Buffers(held, owned, lent, buffer(side for exchange in exchanges for side in exchange.wanted))


def assembled(wire: WireFormat, frame: tuple[int, int], parts: Sequence[Strip], packed: Sequence[Tensor]) -> Tensor:
    """Whole matrices, ``[n, *frame]``, from their bytes; in the buffer itself where these lie without a gap."""
    if (there := in_place(wire, frame, parts, packed)) is not None:
        return there
    whole = torch.empty((len(packed[0]), *frame), dtype=wire.dtype, device=packed[0].device)
    for strip, nbytes in zip(parts, packed, strict=True):
        pieces = strip.of_whole(whole)
        wire.unpack(nbytes, pieces.shape[-2], pieces.shape[-1], pieces)
    return whole


def in_place(
    wire: WireFormat, frame: tuple[int, int], parts: Sequence[Strip], packed: Sequence[Tensor]
) -> Tensor | None:
    """The buffer as whole matrices, ``[n, *frame]``, if they lie there without a gap."""
    rect = parts[0].first.rect
    pieces = wire.view(packed[0], rect.rows, rect.cols) if len(parts) == 1 else None
    if pieces is None or not parts[0].in_order(pieces).is_contiguous():
        return None
    return pieces.view(-1, *frame)


def batch_size(geometry: Geometry) -> int:
    """How many matrices the polar factor takes at a time; as many as kernels have programs along their second axis."""
    return max(1, min(BATCH_ELEMENTS // min(geometry.rows, geometry.cols) ** 2, 2**16 - 1))


def _pieces(parcels: Iterable[Parcel], buffer: Tensor) -> Iterator[PackedPiece]:
    for parcel in parcels:
        for matrix, packed in zip(parcel.bundle.matrices, _rows(parcel, buffer), strict=True):
            yield PackedPiece(matrix, parcel.rect, packed)


def _rows(parcel: Parcel, buffer: Tensor) -> Tensor:
    """The bytes of a parcel as ``[n, nbytes]``, a row a matrix."""
    n = len(parcel.bundle.matrices)
    return buffer[parcel.offset : parcel.offset + n * parcel.nbytes].view(n, parcel.nbytes)
