"""Named tensors in files, through torch.distributed.checkpoint; reading them runs no code that a file brings along.

A file is the tensors' bytes, one tensor behind the other; ``.metadata`` says which lies where. torch's own writer makes
an archive of every tensor instead, with a checksum (the manifest has one), and its reader a copy in memory.
"""

from __future__ import annotations

import ctypes
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

T = TypeVar("T")

# Bytes. Linux caches larger writes in larger blocks of memory, which a virtual machine may have to ask its host for.
_WRITTEN_AT_ONCE = 256 << 10

# What the metadata of tensors is made of: classes of plain data, and names of dtypes and layouts.
_SAFE = {
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "float32", "bfloat16", "float16", "uint8", "int8", "int16", "int32", "int64"),
}


def write(tensors: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Every rank writes its own tensors, whose names no other rank has, into one file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is, in a single process
        dcp.save(
            dict(tensors),
            storage_writer=_Writer(folder, sync_files=False),  # they are synced when they are sealed
            planner=DefaultSavePlanner(flatten_state_dict=False),
            process_group=group,
            no_dist=group is None,
        )


class TensorReader:
    """Reads single tensors by name, in any order, on any rank by itself."""

    def __init__(self, folder: Path) -> None:
        self._reader = _Reader(str(folder))
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def read(self, targets: dict[str, Tensor]) -> None:
        """Into tensors of the shapes and dtypes that were written, wherever they lie."""
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(targets, self._metadata, is_coordinator=True)
        self._reader.read_data(planner.create_local_plan(), planner).wait()


class _Writer(FileSystemWriter):
    """torch's planning and metadata; the latter says nothing of the folder, which is renamed and copied."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        written = []
        with open(Path(self.path) / name, "wb") as file:
            for item in plan.items:
                data = planner.resolve_data(item)
                assert isinstance(data, Tensor)  # nothing else is given to `write`
                tensor = data.detach().cpu().contiguous()
                place = _StorageInfo(name, file.tell(), tensor.nbytes)
                memory = _memory_of(tensor)
                for start in range(0, tensor.nbytes, _WRITTEN_AT_ONCE):
                    file.write(memory[start : start + _WRITTEN_AT_ONCE])
                written.append(WriteResult(item.index, place.length, place))
        return _done(written)

    def storage_meta(self) -> None:
        return None


class _Reader(FileSystemReader):
    """Reads what :class:`_Writer` wrote. The metadata, a pickle, may name nothing that could do harm."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            place = self.storage_data[item.storage_index]
            target = planner.resolve_tensor(item).detach()
            in_place = target.is_cpu and target.is_contiguous()
            tensor = target if in_place else torch.empty(target.shape, dtype=target.dtype)
            with open(Path(self.path) / place.relative_path, "rb") as file:
                file.seek(place.offset)
                if not place.length == tensor.nbytes == file.readinto(_memory_of(tensor)):
                    raise ValueError(f"{place.relative_path} has no {tensor.nbytes} bytes of {item.storage_index.fqn}")
            if not in_place:
                target.copy_(tensor)
            planner.commit_tensor(item, target)
        return _done(None)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        if name not in _SAFE.get(module, ()):
            raise ValueError(f".metadata names {module}.{name}, which no checkpoint of tensors does: do not trust it")
        return super().find_class(module, name)


def _memory_format(enumeration: Any, name: Any) -> _MEM_FORMAT_ENCODING:
    """What stands for ``getattr``, by which Python 3.11.0 to 3.11.3 pickle members of enumerations: it gets these."""
    if enumeration is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise ValueError(
            f".metadata gets {name!r} of {enumeration!r}, which no checkpoint of tensors does: do not trust it"
        )
    return _MEM_FORMAT_ENCODING[name]


def _memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host. The tensor must outlive them."""
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()))


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future
