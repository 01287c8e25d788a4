"""What a checkpoint holds, as its manifest says it: parameters by name, their states, and the pieces of these.

Every piece is stored as the rank had it: the codec's buffers of one region, each a tensor of its own. So no layout and
no codec needs anything from the format, and a loader finds with regions alone what it needs.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, cast

import torch

from muon_dist.codecs import CODECS, Codec
from muon_dist.forms import Form
from muon_dist.groups import GROUP_OPTIONS
from muon_dist.layout import Extent
from muon_dist.options import Algorithm, MomentumState, Options, require_one_of
from muon_dist.regions import Region
from muon_dist.state import codec_of, codec_of_run


@dataclass(frozen=True)
class SavedState:
    """One state of a parameter, such as its momentum."""

    codec: str  # one of CODECS
    block: int
    pieces: tuple[Region, ...]  # disjoint, and all of it
    extent: Extent | None = None  # of a matrix that meshes cut
    rank_fraction: float | None = None
    splits: tuple[int, ...] = ()  # of a momentum: its form's

    def codec_for(self, label: str, piece: Region) -> Codec:
        """The codec that stored a piece."""
        codec = cast(MomentumState, self.codec)
        if piece.flat:
            form = Form(piece.shape, self.splits) if self.splits else None
            return codec_of_run(label, codec, self.block, piece, form, self.rank_fraction)
        return codec_of(label, codec, self.block, self.extent, self.rank_fraction)


@dataclass(frozen=True)
class SavedParameter:
    """A parameter: shape of the whole, its group's options, and its states by label."""

    shape: tuple[int, ...]
    algorithm: Algorithm
    options: Mapping[str, Any]
    states: Mapping[str, SavedState]


@dataclass(frozen=True)
class Contents:
    """All of a checkpoint."""

    parameters: Mapping[str, SavedParameter]
    options: Mapping[str, Any]  # of the optimizer that saved it
    world_size: int
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Contents:
        """Raises ValueError for what is no optimizer's state, and for a codec that this version does not have."""
        if "parameters" not in facts:
            raise ValueError(
                "this is a checkpoint of a run of muon-dist train, of which --resume takes all. Portable state is what "
                "muon_dist.checkpoint.save_state writes"
            )
        parameters = {name: _parameter_from(entry) for name, entry in facts["parameters"].items()}
        return cls(parameters, facts["options"], facts["world_size"], facts["versions"])


def tensor_key(name: str, label: str, region: Region, buffer: str) -> str:
    """The name under which torch.distributed.checkpoint stores one buffer of a piece."""
    return f"{name}/{label}/{'.'.join(map(str, region.offset))}/{buffer or 'values'}"


def options_to_json(options: Options) -> dict[str, Any]:
    return {**asdict(options), "polar_dtype": options.polar_dtype and str(options.polar_dtype)}


def group_to_json(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group's options."""
    return {**{key: group[key] for key in GROUP_OPTIONS}, "lr": float(group["lr"]), "betas": list(group["betas"])}


def group_from_json(options: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`group_to_json`."""
    return {key: tuple(value) if key == "betas" else value for key, value in options.items()}


def versions() -> dict[str, str]:
    return {"muon_dist": version("muon_dist"), "torch": str(torch.__version__), "python": platform.python_version()}


def _parameter_from(entry: Mapping[str, Any]) -> SavedParameter:
    for label, state in entry["states"].items():
        require_one_of(f"the codec of {label}", state["codec"], CODECS)
    states = {
        label: SavedState(
            state["codec"],
            state["block"],
            tuple(map(region_from, state["pieces"])),
            extent_from(state["extent"]),
            state["rank_fraction"],
            tuple(state.get("splits", ())),  # older checkpoints have one matrix a parameter
        )
        for label, state in entry["states"].items()
    }
    return SavedParameter(tuple(entry["shape"]), entry["algorithm"], entry["options"], states)


def extent_from(entry: Any) -> Extent | None:
    if entry is None:
        return None
    matrix, part, cuts, run = entry
    return Extent(tuple(matrix), tuple(part), tuple(cuts), run)


def region_from(entry: Any) -> Region:
    shape, offset, size, flat = entry
    return Region(tuple(shape), tuple(offset), tuple(size), flat)
