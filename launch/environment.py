"""This process's place in the job: torchrun's variables, the device and the default process group."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from muon_dist.launch.config import UsageError

TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Environment:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> float:
        """The sum of one number over all ranks."""
        value = value.detach().double()
        dist.all_reduce(value)
        return value.item()

    def maximum(self, value: int) -> int:
        """The largest of one number over all ranks."""
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor.item())


def started_by_torchrun(variables: Mapping[str, str]) -> bool:
    """Whether torchrun's variables are set; half of them is an error, not a guess."""
    missing = [name for name in TORCHRUN_VARIABLES if name not in variables]
    # MASTER_ADDR and MASTER_PORT alone are common leftovers of a cluster's profile and start nothing.
    if not any(name in variables for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
        return False
    if missing:
        given = [name for name in TORCHRUN_VARIABLES if name in variables]
        raise UsageError(
            f"{', '.join(given)} set but {', '.join(missing)} missing: start with torchrun, which sets them all, "
            f"or unset {', '.join(given)} to run a single process"
        )
    return True


def read_environment(variables: Mapping[str, str]) -> Environment:
    """Rank, world size and device; without torchrun a job of one."""
    rank, world_size, local_rank = 0, 1, 0
    if started_by_torchrun(variables):
        rank, world_size, local_rank = (int(variables[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return Environment(rank, world_size, device)


def make_cuda_deterministic() -> None:
    """So that a seed gives one run, and a resumed run is the uninterrupted one, as they are on CPU anyway."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when its first handle is made
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # only costs time


@contextmanager
def process_group(environment: Environment) -> Iterator[None]:
    """The default process group for the length of the block: NCCL on CUDA, gloo on CPU."""
    on_cuda = environment.device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(environment.device)
        make_cuda_deterministic()
    # A job that torchrun didn't start has no address to meet at, and needs none: its store lives in this process.
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=None if started_by_torchrun(os.environ) else dist.HashStore(),
        rank=environment.rank,
        world_size=environment.world_size,
        device_id=environment.device if on_cuda else None,
    )
    yield
    # Not in a `finally`: after an error the other ranks may sit in a collective, and waiting for them would hide it.
    dist.destroy_process_group()
