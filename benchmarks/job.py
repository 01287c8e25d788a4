"""The ranks of a benchmark: how they were started, their clocks and memory, and the machine.

A script here runs as `torchrun benchmarks/NAME.py`, and as well under `deepspeed` and `mpirun`; its folder is then on
Python's path, so that these modules import each other by name.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from muon_dist.launch.config import UsageError
from muon_dist.launch.environment import read_environment, started_by_launcher


@dataclass(frozen=True)
class Job:
    """All ranks, and this one's device. Clocks are compared over gloo, which leaves the GPUs alone."""

    rank: int
    ranks: int
    device: torch.device
    mesh: DeviceMesh
    host_group: dist.ProcessGroup

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Until all GPUs and ranks have come here."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)
        dist.barrier(self.host_group)

    def maximum(self, value: float) -> float:
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, self.host_group)
        return tensor.item()

    def median_milliseconds(self, step: Callable[[], object], repeats: int, seconds: float) -> float:
        """Of ``step`` on the slowest rank. Stops early, after three, when ``seconds`` are spent."""
        times: list[float] = []
        while len(times) < repeats and (len(times) < 3 or sum(times) < 1e3 * seconds):
            self.synchronize()
            started = time.perf_counter()
            step()
            if self.on_cuda:
                torch.cuda.synchronize(self.device)
            times.append(self.maximum(1e3 * (time.perf_counter() - started)))
        return statistics.median(times)

    def peak_gib(self) -> float | None:
        """The most memory that any rank's tensors took since the last reset; None on CPU."""
        return self.maximum(torch.cuda.max_memory_allocated(self.device)) / 2**30 if self.on_cuda else None

    def reset_memory(self) -> None:
        """Lets go of what the last measurement left, and resets the peak."""
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def machine(self) -> dict[str, Any]:
        """What the figures are measured on."""
        return {
            "device": torch.cuda.get_device_name(self.device) if self.on_cuda else "cpu",
            "torch": torch.__version__,
            "python": platform.python_version(),
        }


def start(share_gpu: bool = False) -> Job:
    """Joins the job: NCCL with a rank a GPU, gloo on CPU.

    Args:
        share_gpu: all ranks on the first GPU. NCCL refuses two ranks of one host on one GPU, so each is a host.

    Raises:
        UsageError: the launcher's variables are wrong or partial.
    """
    if share_gpu:
        if "LOCAL_RANK" not in os.environ:
            raise UsageError("--share-gpu needs LOCAL_RANK: start with torchrun or deepspeed")
        os.environ["NCCL_HOSTID"] = f"host{os.environ['LOCAL_RANK']}"
        os.environ["LOCAL_RANK"] = "0"
    environment = read_environment(os.environ)
    rank, ranks, device = environment.rank, environment.world_size, environment.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=None if started_by_launcher(os.environ) else dist.HashStore(),
        rank=rank,
        world_size=ranks,
    )
    mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    return Job(rank, ranks, device, mesh, dist.new_group(backend="gloo"))
