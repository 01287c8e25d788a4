"""FSDP2: shard a transformer block by block, on a 1-D mesh or, with replicas, a 2-D one (HSDP).

The optimizer needs nothing from here: it reads meshes and placements from the parameters. This is how to get there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def data_parallel_mesh(device_type: str, replicas: int = 1) -> DeviceMesh:
    """All ranks of the job: shards alone, or `replicas` copies of the shards."""
    world_size = dist.get_world_size()
    if world_size % replicas:
        raise ValueError(f"{world_size} ranks do not split into {replicas} replicas; use a divisor of {world_size}")
    if replicas == 1:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicas, world_size // replicas), mesh_dim_names=("replicate", "shard"))


def shard_transformer(
    model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, mixed_precision: MixedPrecisionPolicy
) -> FSDPModule:
    """Shard in place. A block is gathered as one, so only one block's parameters are whole at a time."""
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=mixed_precision)
    # The root takes what is left (embedding, last norm, head); its parameters are needed first and last.
    return fully_shard(model, mesh=mesh, mp_policy=mixed_precision)


@contextmanager
def no_gradient_sync(model: FSDPModule) -> Iterator[None]:
    """For all micro-batches but the last: gradients add up unreduced, as in DDP's `no_sync`."""
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)
