"""The exchange of one chunk: pack, all-to-all, unpack, towards the owners and back.

Pieces go from the ranks that hold them into whole matrices on their owners, and updates go from the owners to the
ranks that want them. Both directions are one uneven ``all_to_all_single`` over bytes; the plan says where each piece
lies. Every rank takes part in every collective, also with nothing to send, so a rank without pieces never holds up
the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from muon_dist.layout import Rect
from muon_dist.plan import Chunk, Parcel
from muon_dist.wire import WireFormat


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
        self._gather = chunk.gather(rank, ranks, wire)
        self._scatter = chunk.scatter(rank, ranks, wire)
        self.owned = tuple(bundle for bundle in chunk.bundles if bundle.owner == rank)

    @property
    def holder_bytes(self) -> int:
        """Bytes of this rank's own pieces, the larger of the two directions: they share a buffer."""
        return max(sum(self._gather.holder_splits), sum(self._scatter.holder_splits))

    @property
    def owner_bytes(self) -> int:
        """Bytes of all pieces of the matrices that this rank owns, the larger of the two directions."""
        return max(sum(self._gather.owner_splits), sum(self._scatter.owner_splits))

    def pack_held(self, piece_of: Callable[[int, Rect], Tensor], holder: Tensor) -> None:
        """Fills the holder's buffer with ``piece_of(matrix, rect)``: ``[rect.rows, rect.cols]``, floating point."""
        for parcel in self._gather.holder:
            for matrix, packed in zip(parcel.bundle.matrices, _rows(parcel, holder), strict=True):
                self._wire.pack(piece_of(matrix, parcel.rect).unsqueeze(0), packed.unsqueeze(0))

    def send_to_owners(self, holder: Tensor, owner: Tensor) -> dist.Work | None:
        """Starts the collective from the holder's buffer into the owner's."""
        return self._trade(holder, self._gather.holder_splits, owner, self._gather.owner_splits)

    def unpack_owned(self, owner: Tensor) -> list[Tensor]:
        """Whole matrices from the owner's buffer: for each owned bundle ``[n, rows, cols]``.

        Tall matrices are laid out as their transposes, the way the polar factor wants them, and returned as views.
        """
        stacks = []
        for bundle in self.owned:
            rows, cols = bundle.geometry.rows, bundle.geometry.cols
            stack: Tensor | None = None
            for parcel in self._gather.owner:
                if parcel.bundle is not bundle:
                    continue
                pieces = self._wire.unpack(_rows(parcel, owner), parcel.rect.rows, parcel.rect.cols)
                if stack is None:
                    n = len(bundle.matrices)
                    tall = rows > cols
                    stack = pieces.new_empty((n, cols, rows)).mT if tall else pieces.new_empty((n, rows, cols))
                stack[(slice(None), *parcel.rect.slices)] = pieces
            assert stack is not None, "the planner gives every matrix at least one held piece"
            stacks.append(stack)
        return stacks

    def pack_updates(self, stacks: list[Tensor], owner: Tensor) -> None:
        """Fills the owner's buffer with the updates, ``[n, rows, cols]`` for each owned bundle."""
        by_bundle = {id(bundle): stack for bundle, stack in zip(self.owned, stacks, strict=True)}
        for parcel in self._scatter.owner:
            stack = by_bundle[id(parcel.bundle)]
            self._wire.pack(stack[(slice(None), *parcel.rect.slices)], _rows(parcel, owner))

    def send_back(self, owner: Tensor, holder: Tensor) -> dist.Work | None:
        """Starts the collective from the owner's buffer into the holder's."""
        return self._trade(owner, self._scatter.owner_splits, holder, self._scatter.holder_splits)

    def unpack_wanted(self, holder: Tensor, apply: Callable[[int, Rect, Tensor], None]) -> None:
        """Calls ``apply(matrix, rect, update)`` for each piece in the holder's buffer."""
        for parcel in self._scatter.holder:
            updates = self._wire.unpack(_rows(parcel, holder), parcel.rect.rows, parcel.rect.cols)
            for matrix, update in zip(parcel.bundle.matrices, updates, strict=True):
                apply(matrix, parcel.rect, update)

    def _trade(
        self, sent: Tensor, sent_splits: tuple[int, ...], received: Tensor, received_splits: tuple[int, ...]
    ) -> dist.Work | None:
        if self._group is None:
            return None
        work: dist.Work = dist.all_to_all_single(
            received[: sum(received_splits)],
            sent[: sum(sent_splits)],
            list(received_splits),
            list(sent_splits),
            group=self._group,
            async_op=True,
        )
        return work


def _rows(parcel: Parcel, buffer: Tensor) -> Tensor:
    """The bytes of a parcel as ``[n, nbytes]``, a row a matrix."""
    n = len(parcel.bundle.matrices)
    return buffer[parcel.offset : parcel.offset + n * parcel.nbytes].view(n, parcel.nbytes)


def new_buffers(
    exchanges: list[Exchange], group: dist.ProcessGroup | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A holder's and an owner's buffer (uint8) for any of ``exchanges``; one and the same without a group."""
    holder = torch.empty(max(e.holder_bytes for e in exchanges), dtype=torch.uint8, device=device)
    if group is None:
        return holder, holder
    return holder, torch.empty(max(e.owner_bytes for e in exchanges), dtype=torch.uint8, device=device)
