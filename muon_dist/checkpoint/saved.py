"""One state in a checkpoint: its pieces as they are stored, or its values of any region, whichever pieces have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from muon_dist.checkpoint.contents import SavedState, tensor_key
from muon_dist.checkpoint.storage import TensorReader
from muon_dist.codecs import Codec
from muon_dist.regions import Region, shared


@dataclass(frozen=True)
class SavedTensor:
    """One state of one parameter."""

    reader: TensorReader
    name: str
    label: str
    state: SavedState

    def codec_of(self, piece: Region) -> Codec:
        """The codec that stored a piece."""
        return self.state.codec_for(self.label, piece)

    def overlapping(self, region: Region) -> list[Region]:
        """The pieces that have something of ``region``."""
        return [piece for piece in self.state.pieces if next(shared(piece, region), None)]

    def read_into(self, piece: Region, buffers: Mapping[str, Tensor]) -> None:
        """The codec's buffers of one piece."""
        self.reader.read({tensor_key(self.name, self.label, piece, key): tensor for key, tensor in buffers.items()})

    def read(self, piece: Region, device: torch.device) -> dict[str, Tensor]:
        """The codec's buffers of one piece, in memory of their own."""
        specs = self.codec_of(piece).buffers(piece.local_shape)
        buffers = {key: torch.empty(spec.shape, dtype=spec.dtype, device=device) for key, spec in specs.items()}
        self.read_into(piece, buffers)
        return buffers

    def values(self, region: Region, device: torch.device) -> Tensor:
        """Decoded, as a tensor that holds ``region``; one piece is in memory at a time."""
        values = torch.zeros(region.local_shape, device=device)
        for piece in self.overlapping(region):
            decoded = self.codec_of(piece).decode(self.read(piece, device), (1, *piece.local_shape)[-1])
            for source, target in shared(piece, region):
                target.of(values).copy_(source.of(decoded))
        return values
