"""Named tensors in files, through torch.distributed.checkpoint; reading them runs no code that a file brings along."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

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
            storage_writer=_Writer(folder, sync_files=False),  # they are synced when they are hashed
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
    """torch's, but the metadata says nothing of the folder, which is renamed and copied."""

    def storage_meta(self) -> None:
        return None


class _Reader(FileSystemReader):
    """torch's, but the metadata, a pickle, may name nothing that could do harm. Tensors are read with weights_only."""

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
