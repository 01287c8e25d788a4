"""This process's place in the job: which launcher started it, the device and the default process group."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from muon_dist.launch.config import UsageError

# What torchrun and the deepspeed launcher set for every process.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What mpirun sets: Open MPI's, and that of MPICH, Intel MPI and MVAPICH.
MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# What srun sets in the tasks that it starts.
SLURM_SIZE_VARIABLE = "SLURM_STEP_NUM_TASKS"


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


def started_by_launcher(variables: Mapping[str, str]) -> bool:
    """Whether a launcher's variables are set; half of them is an error, not a guess."""
    missing = [name for name in LAUNCHER_VARIABLES if name not in variables]
    # MASTER_ADDR and MASTER_PORT alone are common leftovers of a cluster's profile and start nothing.
    if not any(name in variables for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
        return False
    if missing:
        given = [name for name in LAUNCHER_VARIABLES if name in variables]
        raise UsageError(
            f"{', '.join(given)} set but {', '.join(missing)} missing: start with torchrun or deepspeed, which set "
            f"them all, or unset {', '.join(given)} to run a single process or under mpirun"
        )
    return True


def attempt(variables: Mapping[str, str]) -> int:
    """How often torchrun has restarted this job (--max-restarts)."""
    return number(variables, "TORCHELASTIC_RESTART_COUNT") if "TORCHELASTIC_RESTART_COUNT" in variables else 0


def meet_over_mpi(size_variable: str, size: str) -> dict[str, str]:
    """A launcher's variables for a process of mpirun. MPI only arranges the meeting; training uses NCCL or gloo."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: it finds no MPI library
        raise UsageError(
            f"mpirun started this process ({size_variable} is set), but mpi4py does not import: "
            f"{str(error).splitlines()[0]}; "
            f"pip install 'muon_dist[mpi]', or start with torchrun or deepspeed"
        ) from None
    world = MPI.COMM_WORLD
    if world.size != int(size):
        raise UsageError(
            f"mpirun started {size} processes ({size_variable}), mpi4py's MPI library sees {world.size}: it belongs to "
            f"another MPI; install mpi4py for the MPI of this mpirun, or use the mpirun of mpi4py's MPI"
        )
    hosts = world.allgather(socket.gethostname())
    address = "127.0.0.1" if len(set(hosts)) == 1 else hosts[0]
    variables = {
        "RANK": str(world.rank),
        "LOCAL_RANK": str(hosts[: world.rank].count(hosts[world.rank])),
        "WORLD_SIZE": str(world.size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(world.bcast(free_port() if world.rank == 0 else None)),
    }
    # A rank that fails later must end, and mpirun with it. At its exit it would wait here for the others.
    MPI.Finalize()
    return variables


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        port: int = listener.getsockname()[1]
        return port


def read_environment(variables: MutableMapping[str, str]) -> Environment:
    """Rank, world size and device; without a launcher a job of one.

    Whichever launcher it was, `variables` afterwards hold what torchrun would have set: torch and DeepSpeed read them.
    """
    if not started_by_launcher(variables):
        size_variable = next((name for name in MPI_SIZE_VARIABLES if variables.get(name, "1") != "1"), None)
        if size_variable is not None:
            variables.update(meet_over_mpi(size_variable, variables[size_variable]))
        elif variables.get(SLURM_SIZE_VARIABLE, "1") != "1":
            raise UsageError(
                f"srun started {variables[SLURM_SIZE_VARIABLE]} processes ({SLURM_SIZE_VARIABLE}), and no launcher has "
                f"told them of each other: sbatch launch/slurm.sbatch starts torchrun once a node"
            )
    rank, world_size, local_rank = 0, 1, 0
    if started_by_launcher(variables):
        rank, world_size, local_rank = (number(variables, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not torch.cuda.is_available():
        return Environment(rank, world_size, torch.device("cpu"))
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"LOCAL_RANK is {local_rank}, but this machine has {torch.cuda.device_count()} GPUs; start a process a GPU"
        )
    return Environment(rank, world_size, torch.device("cuda", local_rank))


def number(variables: Mapping[str, str], name: str) -> int:
    try:
        return int(variables[name])
    except ValueError:
        raise UsageError(f"{name}={variables[name]!r} is no number: start with torchrun, deepspeed or mpirun") from None


def make_cuda_deterministic() -> None:
    """So that a seed gives one run, and a resumed run is the uninterrupted one, as they are on CPU anyway."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when its first handle is made
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # only costs time


def meeting_store(environment: Environment) -> dist.Store:
    """Where the ranks find each other. A job that no launcher started needs no address: its store is in this process.

    torchrun has one store for all its attempts, in which gloo would find the addresses of ranks that are gone and hang:
    each attempt has a part of it to itself.
    """
    if not started_by_launcher(os.environ):
        return dist.HashStore()
    store, _, _ = next(rendezvous("env://", environment.rank, environment.world_size))
    return dist.PrefixStore(f"attempt {attempt(os.environ)}", store)


@contextmanager
def process_group(environment: Environment) -> Iterator[None]:
    """The default process group for the length of the block: NCCL on CUDA, gloo on CPU."""
    on_cuda = environment.device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(environment.device)
        make_cuda_deterministic()
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        store=meeting_store(environment),
        rank=environment.rank,
        world_size=environment.world_size,
        device_id=environment.device if on_cuda else None,
    )
    yield
    # Not in a `finally`: after an error the other ranks may sit in a collective, and waiting for them would hide it.
    if dist.is_initialized():  # DeepSpeed's engine has destroyed it
        dist.destroy_process_group()
    # Groups that are left in reference cycles would end with the interpreter, and a thread of gloo's that needs it then
    # aborts the process after all was well.
    gc.collect()
