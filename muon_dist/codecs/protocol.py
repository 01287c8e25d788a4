"""What a codec is: how one piece of a matrix-shaped optimizer state is stored between steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from muon_dist.kernels import Encoded


class BufferSpec(NamedTuple):
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Codec(Protocol):
    """Stores fp32 tensors ``[..., cols]`` in one or more buffers; several of one shape can be stacked in front.

    Row-wise codecs (fp32, bf16, and those of row blocks) make a row's bytes of that row alone. The other ones look at
    a whole piece, [rows, cols].
    """

    @property
    def name(self) -> str:
        """The name users choose it by."""

    @property
    def row_wise(self) -> bool:
        """Whether a state cut between rows is the concatenation of the cut states, buffer by buffer. Then, too,
        ``encode(decode(buffers))`` gives back the same buffers, bit for bit."""

    def buffers(self, shape: Sequence[int]) -> dict[str, BufferSpec]:
        """The tensors that store a state, or a part of one, of ``shape``. A lone buffer is called ''. Buffers of zeros
        decode to zeros."""

    def whole(self, shape: Sequence[int]) -> dict[str, BufferSpec]:
        """The tensors of which the buffers of all ranks are the shards, for a state of ``shape``."""

    def encode(self, values: Tensor, buffers: Mapping[str, Tensor]) -> None:
        """Writes ``values`` (floating point) into ``buffers``, in place. What they held before may be where it starts
        from."""

    def for_kernels(self, buffers: Mapping[str, Tensor]) -> Encoded:
        """The stored values as kernels take them. Not of low-rank codecs, which are taken apart."""

    def decode(self, buffers: Mapping[str, Tensor], cols: int, out: Tensor | None = None) -> Tensor:
        """The stored values, ``[..., cols]``: in ``out`` (floating point), or fp32 in memory of their own.
        (Codes of which two share a byte do not tell how many columns there are.)"""


class RowWise:
    """What row-wise codecs have in common."""

    row_wise = True

    def buffers(self, shape: Sequence[int]) -> dict[str, BufferSpec]:
        """All dimensions of a buffer but the last are the state's, so it shards with them."""
        raise NotImplementedError

    def whole(self, shape: Sequence[int]) -> dict[str, BufferSpec]:
        return self.buffers(shape)
