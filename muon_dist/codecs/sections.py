"""A run of a flattened parameter that has parts of several matrices: each part is stored by a codec of its own.

So no block, and no low-rank part, lies in two matrices, and a matrix's part is stored as if it were alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from muon_dist.codecs.protocol import BufferSpec, Codec
from muon_dist.kernels import Encoded


@dataclass(frozen=True)
class Sections:
    """Codecs of ``[1, length]`` each, one part behind the other: every buffer is those of the parts, flattened.

    Attributes:
        codecs: of each part, of one kind: their buffers have the same names and dtypes.
        lengths: elements of each part.
    """

    codecs: tuple[Codec, ...]
    lengths: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.codecs[0].name

    @property
    def row_wise(self) -> bool:
        return all(codec.row_wise for codec in self.codecs)

    def buffers(self, shape: Sequence[int]) -> dict[str, BufferSpec]:
        specs = [codec.buffers((1, length)) for codec, length in zip(self.codecs, self.lengths, strict=True)]
        return {
            name: BufferSpec((sum(torch.Size(part[name].shape).numel() for part in specs),), spec.dtype)
            for name, spec in specs[0].items()
        }

    def whole(self, shape: Sequence[int]) -> dict[str, BufferSpec]:
        return self.buffers(shape)  # what a run is a part of, only its engine knows

    def for_kernels(self, buffers: Mapping[str, Tensor]) -> Encoded:
        raise NotImplementedError("kernels take one section at a time")

    def encode(self, values: Tensor, buffers: Mapping[str, Tensor]) -> None:
        for part, (codec, stored) in zip(values.split(self.lengths, -1), self._parts(buffers), strict=True):
            codec.encode(part, stored)

    def decode(self, buffers: Mapping[str, Tensor], cols: int, out: Tensor | None = None) -> Tensor:
        parts = zip(self._parts(buffers), self.lengths, strict=True)
        return torch.cat([codec.decode(stored, length) for (codec, stored), length in parts], -1, out=out)

    def section(self, start: int, buffers: Mapping[str, Tensor]) -> tuple[Codec, dict[str, Tensor]]:
        """Codec and buffers of the part that starts at element ``start`` of the run."""
        index = list(accumulate(self.lengths, initial=0)).index(start)
        return list(self._parts(buffers))[index]

    def _parts(self, buffers: Mapping[str, Tensor]) -> Iterator[tuple[Codec, dict[str, Tensor]]]:
        """Codec and buffers of every part."""
        starts = dict.fromkeys(buffers, 0)
        for codec, length in zip(self.codecs, self.lengths, strict=True):
            stored = {}
            for name, spec in codec.buffers((1, length)).items():
                size = torch.Size(spec.shape).numel()
                stored[name] = buffers[name][starts[name] : starts[name] + size].view(spec.shape)
                starts[name] += size
            yield codec, stored
