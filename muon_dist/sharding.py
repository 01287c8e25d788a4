"""Reads from a parameter where it lives: mesh and placements become pieces, local state becomes DTensors again.

No engine is named here: FSDP2 and HSDP give DTensors, DDP and a single process give plain tensors, and a plain tensor
is one that every rank of the group holds whole. The geometry is computed from the placements by our own code, never
by DTensor redistribution: torch's helpers are private, changed between releases, and are wrong for uneven strided
shards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from muon_dist.forms import Form, as_tables
from muon_dist.layout import Extent, Geometry, Piece, Rect, aligned_block, chunk_range
from muon_dist.regions import Region

Placements: TypeAlias = tuple[Placement, ...]


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that lies on this rank.

    Reads the attribute rather than ``to_local()``, which costs 12 us a call on torch 2.13 and is called for every
    parameter and gradient of every step.
    """
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Home:
    """Where a tensor lives: the ranks of its mesh, how they are arranged, and its placements on them.

    Attributes:
        ranks: global ranks of the mesh, ascending: the process group that exchanges its matrices.
        mesh_shape: sizes of the mesh's dimensions.
        coordinates: the mesh coordinate of each entry of ``ranks``.
        placements: one placement a mesh dimension; Shard, Replicate or FSDP2's strided shard.
        shares_momentum: whether replicas share out the momentum. Where an engine saves the state of one replica only,
            each has to keep all of it.
    """

    ranks: tuple[int, ...]
    mesh_shape: tuple[int, ...]
    coordinates: tuple[tuple[int, ...], ...]
    placements: Placements
    shares_momentum: bool = True

    @property
    def momentum_placements(self) -> Placements:
        """Placements of the momentum: the parameter's, but where the parameter is replicated and a tensor dimension is
        still whole, the momentum is sharded over it, so that replicas share the state instead of repeating it.

        Rows are taken first (DDP), columns when rows are already sharded (HSDP): each mesh dimension shards its own
        tensor dimension, which DTensor and its checkpoints handle at any size. Where both are, it is repeated.
        """
        if not self.shares_momentum:
            return self.placements
        free = [dim for dim in (0, 1) if not any(p.is_shard(dim) for p in self.placements)]
        chosen: list[Placement] = []
        for size, placement in zip(self.mesh_shape, self.placements, strict=True):
            shareable = placement.is_replicate() and size > 1 and free
            chosen.append(Shard(free.pop(0)) if shareable else placement)
        return tuple(chosen)

    @cached_property
    def momentum_copies(self) -> int:
        """How many ranks keep the same momentum."""
        repeated = zip(self.mesh_shape, self.momentum_placements, strict=True)
        return math.prod(size for size, placement in repeated if placement.is_replicate())

    def region(self, shape: Sequence[int], placements: Placements, rank: int) -> Region:
        """The part of a tensor that lies on ``ranks[rank]`` under ``placements``."""
        extent = local_extent(shape, self.mesh_shape, self.coordinates[rank], placements)
        return Region(tuple(shape), tuple(offset for offset, _ in extent), tuple(size for _, size in extent))


def home_of(parameter: Tensor, group_ranks: Sequence[int], shares_momentum: bool = True) -> Home:
    """Where ``parameter`` lives. A plain tensor counts as replicated over ``group_ranks`` (ascending global ranks)."""
    if isinstance(parameter, DTensor):
        return _mesh_home(parameter.device_mesh, tuple(parameter.placements))
    ranks = tuple(group_ranks)
    return Home(ranks, (len(ranks),), tuple((i,) for i in range(len(ranks))), (Replicate(),), shares_momentum)


@lru_cache(maxsize=256)
def _mesh_home(mesh: DeviceMesh, placements: Placements) -> Home:
    by_rank = {
        int(rank): tuple(int(i) for i in where)
        for where in torch.cartesian_prod(*(torch.arange(n) for n in mesh.shape)).reshape(-1, mesh.ndim).tolist()
        for rank in [mesh.mesh[tuple(where)].item()]
    }
    ranks = tuple(sorted(by_rank))
    return Home(ranks, tuple(mesh.shape), tuple(by_rank[rank] for rank in ranks), placements)


@lru_cache(maxsize=4096)
def geometries_of(form: Form, home: Home, turn: int = 0) -> tuple[Geometry, ...]:
    """Pieces of a parameter's matrices over the ranks of ``home``; cached, since layers repeat.

    Args:
        turn: which of the ranks that keep the same momentum sends it.
    """
    # Of each matrix: by the part that they have of it in the parameter; by that and the part in the momentum.
    readers: list[dict[Rect, list[int]]] = [{} for _ in range(form.count)]
    keepers: list[dict[tuple[Rect, Rect], list[int]]] = [{} for _ in range(form.count)]
    for rank in range(len(home.ranks)):
        stored = dict(form.rects_in(as_tables(home.region(form.shape, home.placements, rank))))
        for matrix, rect in stored.items():
            readers[matrix].setdefault(rect, []).append(rank)
        for matrix, held in form.rects_in(as_tables(home.region(form.shape, home.momentum_placements, rank))):
            keepers[matrix].setdefault((stored[matrix], held), []).append(rank)
    found = []
    for matrix in range(form.count):
        pieces = []
        for (part, held), ranks in keepers[matrix].items():
            sender = ranks[turn]
            others = tuple(rank for rank in ranks if rank != sender)
            pieces.append(Piece(sender, held, tuple(readers[matrix][part]), others))
        found.append(Geometry(form.rows(matrix), form.cols, tuple(sorted(pieces))))
    return tuple(found)


@lru_cache(maxsize=4096)
def block_of(shape: tuple[int, ...], home: Home, placements: Placements, block_size: int) -> int:
    """Block length for a state of ``shape`` so that no block of its last dimension crosses a cut between ranks."""
    extents = (local_extent(shape, home.mesh_shape, where, placements)[-1] for where in home.coordinates)
    return aligned_block(shape[-1], sorted({start for start, length in extents if length}), block_size)


@lru_cache(maxsize=4096)
def extent_of(shape: tuple[int, ...], home: Home, placements: Placements) -> Extent:
    """Of a matrix, or of each of a stack, that lies on ``home.ranks`` as ``placements`` say."""
    # Cuts are torch.chunk's, so the first part is the largest.
    *_, (_, rows), (_, cols) = local_extent(shape, home.mesh_shape, (0,) * len(home.mesh_shape), placements)
    ndim = len(shape)
    row_cuts, col_cuts = (
        math.prod(n for n, p in zip(home.mesh_shape, placements, strict=True) if _shards(p, dim, ndim))
        for dim in (ndim - 2, ndim - 1)
    )
    return Extent((shape[-2], shape[-1]), (rows, cols), (row_cuts, col_cuts))


def local_extent(
    shape: Sequence[int], mesh_shape: Sequence[int], coordinate: Sequence[int], placements: Placements
) -> list[tuple[int, int]]:
    """Offset and size in each dimension of the shard at one mesh coordinate.

    Mesh dimensions that shard the same tensor dimension cut it one after the other, left to right; a strided shard cuts
    after all of those to its right (FSDP2 over tensor parallelism).

    Raises:
        NotImplementedError: a strided shard with a split factor that FSDP2 would not give.
    """
    extent = [(0, size) for size in shape]
    for dim in range(len(shape)):
        cutting = [i for i, p in enumerate(placements) if _shards(p, dim, len(shape))]
        strided = [i for i in cutting if isinstance(placements[i], _StridedShard)]
        for i in strided:
            factor = math.prod(mesh_shape[j] for j in cutting if j > i)
            if getattr(placements[i], "split_factor", None) != factor:
                raise NotImplementedError(
                    f"{placements[i]} on mesh {tuple(mesh_shape)}: expected split factor {factor}"
                )
        for i in [i for i in cutting if i not in strided] + strided[::-1]:
            offset, size = extent[dim]
            start, length = chunk_range(size, mesh_shape[i], coordinate[i])
            extent[dim] = (offset + start, length)
    return extent


def _shards(placement: Placement, dim: int, ndim: int) -> bool:
    return isinstance(placement, Shard | _StridedShard) and placement.dim % ndim == dim


def unsupported_placement(parameter: Tensor) -> str | None:
    """Why the optimizer cannot read this parameter's layout, or None."""
    if not isinstance(parameter, DTensor):
        return None
    mesh = parameter.device_mesh
    if mesh.get_coordinate() is None:
        return f"rank {dist.get_rank()} is not in its mesh {mesh}; give the optimizer only parameters of its own meshes"
    for placement in parameter.placements:
        if isinstance(placement, Partial) or not isinstance(placement, Shard | _StridedShard | Replicate):
            return f"it has the placement {placement!r}; only Shard and Replicate can be stored and updated"
    return None


@lru_cache(maxsize=256)
def folds(shape: tuple[int, ...], home: Home) -> bool:
    """Whether what each rank has of a parameter of ``shape`` is the same elements when it is folded to
    [rows, all the rest]."""
    inner = math.prod(shape[2:])
    for rank in range(len(home.ranks)):
        region = home.region(shape, home.placements, rank)
        folded = home.region((shape[0], shape[1] * inner), home.placements, rank)
        (row, col, *_), (rows, cols, *rest) = region.offset, region.size
        if tuple(rest) != shape[2:] or (folded.offset, folded.size) != ((row, col * inner), (rows, cols * inner)):
            return False
    return True


def require_gradient_fits(parameter: Tensor, name: str) -> None:
    """Raises ValueError unless the gradient, if there is one, is dense and lies where the parameter lies."""
    gradient = parameter.grad
    if gradient is None:
        return
    if gradient.layout is not torch.strided:
        raise ValueError(f"{name} has a sparse gradient; build its module with sparse=False")
    meshes = [t.device_mesh if isinstance(t, DTensor) else "every rank of its own" for t in (parameter, gradient)]
    if meshes[0] != meshes[1]:
        raise ValueError(f"{name} lies on {meshes[0]} but its gradient on {meshes[1]}; give both the same mesh")


def settle_gradient(parameter: Tensor) -> None:
    """Gives ``parameter.grad`` the parameter's placements: sequence parallelism leaves the gradients of replicated
    parameters as partial sums. Collective on the mesh, so before ranks go on to the pieces that each of them has."""
    gradient = parameter.grad
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor) and gradient.placements != parameter.placements:
        parameter.grad = gradient.redistribute(placements=parameter.placements)


def is_settled(parameter: Tensor) -> bool:
    """Whether there is a gradient that can be read as it is: dense, and laid out as the parameter."""
    gradient = parameter.grad
    if gradient is None or gradient.layout is not torch.strided:
        return False
    layouts = [(t.device_mesh, t.placements) if isinstance(t, DTensor) else None for t in (parameter, gradient)]
    return layouts[0] == layouts[1]


def local_gradient(parameter: Tensor) -> Tensor | None:
    """This rank's part of ``parameter.grad``; None where there is no gradient."""
    if parameter.grad is None:
        return None
    part = local(parameter.grad)
    return part.wait() if isinstance(part, AsyncCollectiveTensor) else part


def wrap_local(piece: Tensor, shape: Sequence[int], mesh: DeviceMesh | None, placements: Placements) -> Tensor:
    """``piece``, left where it lies, as this rank's part of a DTensor of ``shape``, so that checkpoints can reshard
    it."""
    if mesh is None:
        return piece
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    # from_local() would take a part on the host to the mesh's device: it is asked for the layout only.
    whole = DTensor.from_local(
        piece.to("meta"), mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides)
    )
    return DTensor(piece, whole._spec, requires_grad=False)
