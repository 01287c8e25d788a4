"""Optimizer state of one parameter: the tensors that a codec stores it in, as entries of ``optimizer.state[p]``.

State is plain tensors and DTensors under plain names, ``momentum_buffer`` in full precision and
``momentum_buffer_codes`` and ``momentum_buffer_scales`` where it is quantised, so that torch's checkpoints save and
reshard it without knowing codecs. Where an engine keeps many parameters in one flat buffer, their names go in front.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from muon_dist.codecs import Codec, make_codec, make_low_rank_codec, nbytes
from muon_dist.layout import Extent
from muon_dist.options import Options
from muon_dist.sharding import Home, Placements, block_of, extent_of, local, wrap_local

# AdamW moments of parameters with fewer elements stay in fp32: they cost nothing, and norms and biases are sensitive.
SMALLEST_QUANTISED = 4096


@dataclass(frozen=True)
class StateLayout:
    """How a state of one parameter lies on the ranks.

    Attributes:
        shape: of the whole.
        local_shape: of this rank's part.
        block: elements that share a scale, for codecs that have one.
        mesh, placements: how the parts make the whole; mesh is None for a part that only this rank knows of.
        device: where the parts lie.
        extent: of a matrix; None for other shapes.
    """

    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    block: int
    mesh: DeviceMesh | None
    placements: Placements
    device: torch.device
    extent: Extent | None


def sharded_layout(
    shape: Sequence[int],
    home: Home,
    placements: Placements,
    rank: int,
    block_size: int,
    mesh: DeviceMesh | None,
    device: torch.device,
) -> StateLayout:
    """Of a state that lies on ``home.ranks[rank]`` as ``placements`` say; its blocks never cross a cut."""
    whole = tuple(shape)
    part = home.local_shape(whole, placements, rank)
    block = block_of(whole, home, placements, block_size) if whole else block_size
    extent = extent_of(whole, home, placements) if len(whole) == 2 else None
    return StateLayout(whole, part, block, mesh, placements, device, extent)


def flat_layout(shape: Sequence[int], length: int, block_size: int, device: torch.device) -> StateLayout:
    """Of the state of a run of ``length`` elements of a flattened parameter of ``shape``: one row, its blocks counted
    from the start of the run."""
    extent = None
    if len(shape) == 2:
        rows, cols = shape
        extent = Extent((rows, cols), (math.ceil(length / cols), cols), run=True)
    return StateLayout((1, length), (1, length), block_size, None, (), device, extent)


@dataclass(frozen=True)
class StoredTensor:
    """A matrix-shaped (or any-shaped) fp32 quantity that lies in ``optimizer.state[p]`` through a codec."""

    key: str  # its name, such as "momentum_buffer"
    codec: Codec
    layout: StateLayout

    def create(self, state: MutableMapping[str, Any]) -> None:
        """Adds what is missing to a parameter's state, as zeros; empty parts of a whole too, to be loaded into."""
        layout = self.layout
        if layout.mesh is None and math.prod(layout.local_shape) == 0:
            return
        whole = self.codec.whole(layout.shape)
        for buffer, spec in self.codec.buffers(layout.local_shape).items():
            if self._entry(buffer) not in state:
                part = torch.zeros(spec.shape, dtype=spec.dtype, device=layout.device)
                state[self._entry(buffer)] = wrap_local(part, whole[buffer].shape, layout.mesh, layout.placements)

    def buffers(self, state: MutableMapping[str, Any]) -> dict[str, Tensor]:
        """This rank's buffers, by the codec's names."""
        return {buffer: local(state[self._entry(buffer)]) for buffer in self.codec.buffers(self.layout.local_shape)}

    @property
    def nbytes(self) -> int:
        """Bytes on this rank."""
        return nbytes(self.codec, self.layout.local_shape)

    def decode(self, state: MutableMapping[str, Any]) -> Tensor:
        """This rank's part, fp32, of ``layout.local_shape``."""
        return self.codec.decode(self.buffers(state), (1, *self.layout.local_shape)[-1])

    def _entry(self, buffer: str) -> str:
        return f"{self.key}_{buffer}" if buffer else self.key


def momentum_of(layout: StateLayout, options: Options, prefix: str = "") -> StoredTensor:
    """The momentum of a matrix. Raises ValueError where the codec cannot store a matrix that lies like this."""
    name = options.momentum_state
    if name == "grasp4" or name == "lowrank4":
        assert layout.extent is not None
        codec = make_low_rank_codec(name, layout.block, layout.extent, options.rank_fraction)
    else:
        codec = make_codec(name, layout.block)
    return StoredTensor(f"{prefix}momentum_buffer", codec, layout)


def moments_of(
    shape: Sequence[int], layout: StateLayout, options: Options, prefix: str = ""
) -> tuple[StoredTensor, StoredTensor]:
    """AdamW's first and second moment of a parameter of ``shape``."""
    quantised = len(shape) >= 2 and math.prod(shape) >= SMALLEST_QUANTISED
    name = options.adamw_state if quantised else "fp32"
    first, second = (make_codec(name, layout.block, signed=signed) for signed in (True, False))
    return StoredTensor(f"{prefix}exp_avg", first, layout), StoredTensor(f"{prefix}exp_avg_sq", second, layout)
