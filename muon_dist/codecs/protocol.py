"""What a codec is: how one piece of a matrix-shaped optimizer state is stored between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from muon_dist.kernels import Encoded


class BufferSpec(NamedTuple):
    """Shape and dtype of one stored tensor. All its dimensions but the last are the state's, so it shards with them."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Codec(Protocol):
    """Stores a ``[..., cols]`` fp32 tensor in one or more buffers.

    ``encode(decode(buffers))`` gives back the same buffers, bit for bit.
    """

    @property
    def name(self) -> str:
        """The name users choose it by."""

    @property
    def row_wise(self) -> bool:
        """Whether a row's bytes depend on that row alone, so that a state cut between rows is the concatenation of the
        cut states, and every buffer's first dimensions are the state's."""

    def buffers(self, shape: Sequence[int]) -> dict[str, BufferSpec]:
        """The tensors that store a state of ``shape``. A lone buffer is called ''. Buffers of zeros decode to zeros."""

    def encode(self, values: Tensor, buffers: Mapping[str, Tensor]) -> None:
        """Writes ``values`` (fp32) into ``buffers``, in place."""

    def for_kernels(self, buffers: Mapping[str, Tensor]) -> Encoded:
        """The stored values as kernels take them."""

    def decode(self, buffers: Mapping[str, Tensor]) -> Tensor:
        """The stored values: fp32, contiguous, in memory of their own."""
