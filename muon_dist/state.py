"""Optimizer state of one parameter: the tensors that a codec stores it in, as entries of ``optimizer.state[p]``.

State is plain tensors and DTensors under plain names, ``momentum_buffer`` in full precision and
``momentum_buffer_codes`` and ``momentum_buffer_scales`` where it is quantised, so that torch's checkpoints save and
reshard it without knowing codecs.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from muon_dist.codecs import Codec, make_codec
from muon_dist.options import Options
from muon_dist.sharding import Home, Placements, block_of, local, wrap_local

# AdamW moments of parameters with fewer elements stay in fp32: they cost nothing, and norms and biases are sensitive.
SMALLEST_QUANTISED = 4096


@dataclass(frozen=True)
class StoredTensor:
    """A matrix-shaped (or any-shaped) fp32 quantity that lives in ``optimizer.state[p]`` through a codec.

    Attributes:
        key: its name, such as "momentum_buffer".
        codec: how it is stored.
        shape: of the whole.
        local_shape: of this rank's part.
        mesh, placements: how the parts make the whole; mesh is None for a tensor that is not distributed.
        device: where the parts lie.
    """

    key: str
    codec: Codec
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    mesh: DeviceMesh | None
    placements: Placements
    device: torch.device

    def create(self, state: MutableMapping[str, Any]) -> None:
        """Adds what is missing to a parameter's state, as zeros; empty parts too, for checkpoints to load into."""
        whole = self.codec.buffers(self.shape)
        for buffer, spec in self.codec.buffers(self.local_shape).items():
            if self._entry(buffer) not in state:
                part = torch.zeros(spec.shape, dtype=spec.dtype, device=self.device)
                state[self._entry(buffer)] = wrap_local(part, whole[buffer].shape, self.mesh, self.placements)

    def buffers(self, state: MutableMapping[str, Any]) -> dict[str, Tensor]:
        """This rank's buffers, by the codec's names."""
        return {buffer: local(state[self._entry(buffer)]) for buffer in self.codec.buffers(self.local_shape)}

    @property
    def nbytes(self) -> int:
        """Bytes on this rank."""
        return sum(math.prod(s.shape) * s.dtype.itemsize for s in self.codec.buffers(self.local_shape).values())

    def _entry(self, buffer: str) -> str:
        return f"{self.key}_{buffer}" if buffer else self.key


def momentum_of(
    shape: tuple[int, int], home: Home, rank: int, options: Options, mesh: DeviceMesh | None, device: torch.device
) -> StoredTensor:
    """The momentum of a matrix on one rank of its home; where the parameter is replicated, replicas share it out."""
    placements = home.momentum_placements
    codec = make_codec(options.momentum_state, block_of(shape, home, placements, options.block_size))
    local_shape = home.local_shape(shape, placements, rank)
    return StoredTensor("momentum_buffer", codec, shape, local_shape, mesh, placements, device)


def moments_of(
    shape: tuple[int, ...], home: Home, rank: int, options: Options, mesh: DeviceMesh | None, device: torch.device
) -> tuple[StoredTensor, StoredTensor]:
    """AdamW's first and second moment of a parameter, laid out as the parameter."""
    quantised = len(shape) >= 2 and math.prod(shape) >= SMALLEST_QUANTISED
    name = options.adamw_state if quantised else "fp32"
    block = block_of(shape, home, home.placements, options.block_size) if quantised else options.block_size
    local_shape = home.local_shape(shape, home.placements, rank)

    def moment(key: str, *, signed: bool) -> StoredTensor:
        codec = make_codec(name, block, signed=signed)
        return StoredTensor(key, codec, shape, local_shape, mesh, home.placements, device)

    return moment("exp_avg", signed=True), moment("exp_avg_sq", signed=False)
