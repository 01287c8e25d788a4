"""A parameter on this rank, as the optimizer sees it: weight, gradient, state, and where the rest of it lies.

This is what an engine has to be turned into. There are two kinds: a tensor of its own, plain or a DTensor, and a run
of a flat buffer in which an engine keeps many parameters one behind the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from muon_dist.forms import Form, flat_geometries
from muon_dist.layout import Geometry
from muon_dist.regions import Region
from muon_dist.sharding import (
    Home,
    folds,
    geometries_of,
    home_of,
    local,
    local_gradient,
    require_gradient_fits,
    settle_gradient,
    unsupported_placement,
)
from muon_dist.state import StateLayout, flat_layout, sharded_layout


@dataclass(frozen=True)
class Shard(ABC):
    """This rank's part of one trainable parameter.

    Attributes:
        name: of the parameter.
        shape: of the whole parameter.
        group: its parameter group.
        state: the entry of ``optimizer.state`` that its state lies in.
        prefix: of its names in that entry.
        ranks: global ranks over which the parameter lies, ascending; they exchange its matrix.
        device: where it is computed. An offloaded parameter lies elsewhere.
    """

    name: str
    shape: tuple[int, ...]
    group: dict[str, Any]
    state: dict[str, Any]
    prefix: str
    ranks: tuple[int, ...]
    device: torch.device

    @property
    @abstractmethod
    def has_gradient(self) -> bool:
        """Whether there is a gradient in this step."""

    @abstractmethod
    def weight(self) -> Tensor:
        """The part of the parameter that lies here, to be updated in place."""

    @abstractmethod
    def gradient(self) -> Tensor | None:
        """Its gradient, of the same shape."""

    @abstractmethod
    def require_gradient_fits(self) -> None:
        """Raises ValueError for a gradient that cannot be read."""

    @abstractmethod
    def settle_gradient(self) -> None:
        """Makes the gradient lie as the weight does. Collective on ``ranks``."""

    @abstractmethod
    def geometries(self, form: Form) -> tuple[Geometry, ...]:
        """Of its matrices: which rank holds which piece. Raises ValueError for what Muon cannot take."""

    @abstractmethod
    def region(self, form: Form) -> Region:
        """Which part of the tables ``weight()`` is."""

    @abstractmethod
    def momentum_layout(self, form: Form, block_size: int) -> StateLayout:
        """How the momentum lies; replicas share it out."""

    @abstractmethod
    def moments_layout(self, block_size: int) -> StateLayout:
        """How AdamW's moments lie: as the parameter does."""

    @property
    def is_replicated(self) -> bool:
        """Whether several ranks have the same part of it."""
        return False

    @property
    @abstractmethod
    def description(self) -> str:
        """What must be the same on all of ``ranks``."""


@dataclass(frozen=True)
class TensorShard(Shard):
    """A parameter that is a tensor of its own: a DTensor, or a plain one that every rank of a group holds whole."""

    parameter: Tensor
    home: Home
    mesh: DeviceMesh | None  # of the state; None for plain tensors
    turn: int  # which of several ranks with the same momentum sends it

    @classmethod
    def of(
        cls,
        name: str,
        parameter: Tensor,
        group: dict[str, Any],
        state: dict[str, Any],
        replicas: tuple[int, ...],
        replica_mesh: DeviceMesh | None,
        turn: int,
    ) -> TensorShard:
        """Reads mesh and placements from ``parameter``.

        Args:
            replicas: ranks that hold a plain tensor.
            replica_mesh: of these ranks, to share out the momentum; None to repeat it.

        Raises:
            ValueError: it lives where the optimizer cannot follow.
        """
        if reason := unsupported_placement(parameter):
            raise ValueError(f"{name}: {reason}")
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else replica_mesh
        home = home_of(parameter, replicas, shares_momentum=mesh is not None)
        device = parameter.device
        if mesh is not None and mesh.device_type != device.type:  # offloaded to the host
            device = torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())
        return cls(name, tuple(parameter.shape), group, state, "", home.ranks, device, parameter, home, mesh, turn)

    @property
    def has_gradient(self) -> bool:
        return self.parameter.grad is not None

    def weight(self) -> Tensor:
        return local(self.parameter)

    def gradient(self) -> Tensor | None:
        return local_gradient(self.parameter)

    def require_gradient_fits(self) -> None:
        require_gradient_fits(self.parameter, self.name)

    def settle_gradient(self) -> None:
        settle_gradient(self.parameter)

    def drop_gradient(self) -> None:
        """Frees its memory, once the stream in use has done what it was given so far."""
        gradient = self.gradient()
        if gradient is not None and gradient.device.type != "cpu":
            gradient.record_stream(torch.get_device_module(gradient.device).current_stream(gradient.device))
        self.parameter.grad = None

    def geometries(self, form: Form) -> tuple[Geometry, ...]:
        if len(form.shape) < len(self.shape):
            if not folds(self.shape, self.home):
                raise ValueError(
                    f"{self.name} is a convolution of shape {self.shape}, cut as {self.home.placements}: ranks have no "
                    f"rectangles of its matrix. Shard it along dimension 0"
                )
            if not self.weight().is_contiguous():
                raise ValueError(
                    f"{self.name} is a convolution whose elements are not in row-major order (channels_last?); give "
                    f"the model torch.contiguous_format"
                )
        return geometries_of(form, self.home, self.turn % self.home.momentum_copies)

    def region(self, form: Form) -> Region:
        return self.home.region(form.shape, self.home.placements, self._index)

    def momentum_layout(self, form: Form, block_size: int) -> StateLayout:
        placements = self.home.momentum_placements
        return sharded_layout(
            form.shape, self.home, placements, self._index, block_size, self.mesh, self._lies_on, form
        )

    def moments_layout(self, block_size: int) -> StateLayout:
        placements = self.home.placements
        return sharded_layout(self.shape, self.home, placements, self._index, block_size, self.mesh, self._lies_on)

    @property
    def is_replicated(self) -> bool:
        placed = zip(self.home.mesh_shape, self.home.placements, strict=True)
        return any(size > 1 and placement.is_replicate() for size, placement in placed)

    @property
    def description(self) -> str:
        return f"{self.name} {self.shape} {self.parameter.dtype} {self.home.mesh_shape} {self.home.placements}"

    @property
    def _index(self) -> int:
        return self.ranks.index(dist.get_rank()) if len(self.ranks) > 1 else 0

    @property
    def _lies_on(self) -> torch.device:
        return self.parameter.device


@dataclass(frozen=True)
class FlatShard(Shard):
    """A parameter of which each rank has one run of elements, in row-major order, somewhere in a flat buffer.

    Attributes:
        flat: the buffer, [n], fp32 as a rule: the parameter that the engine hands to the optimizer.
        offset: where the run starts in it.
        runs: start and length in the flattened parameter of every rank's run, in the order of ``ranks``.
        index: of this rank.
    """

    flat: Tensor
    offset: int
    runs: tuple[tuple[int, int], ...]
    index: int

    @property
    def has_gradient(self) -> bool:
        return self.flat.grad is not None

    def weight(self) -> Tensor:
        """[1, length]."""
        return self._cut(self.flat.detach())

    def gradient(self) -> Tensor | None:
        """[1, length]."""
        return None if self.flat.grad is None else self._cut(self.flat.grad)

    def require_gradient_fits(self) -> None:
        """It lies in the engine's buffer, as the weight does."""

    def settle_gradient(self) -> None:
        """Nothing to do: engines with flat buffers add up gradients themselves."""

    def geometries(self, form: Form) -> tuple[Geometry, ...]:
        return flat_geometries(form, self.runs)

    def region(self, form: Form) -> Region:
        start, length = self.runs[self.index]
        return Region(form.shape, (start,), (length,), flat=True)

    def momentum_layout(self, form: Form, block_size: int) -> StateLayout:
        return flat_layout(form.shape, *self.runs[self.index], block_size, self.flat.device, form)

    def moments_layout(self, block_size: int) -> StateLayout:
        return flat_layout(self.shape, *self.runs[self.index], block_size, self.flat.device)

    @property
    def description(self) -> str:
        return f"{self.name} {self.shape} {self.flat.dtype} {self.runs}"

    def _cut(self, buffer: Tensor) -> Tensor:
        return buffer[self.offset : self.offset + self.runs[self.index][1]].unsqueeze(0)
