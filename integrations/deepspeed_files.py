"""Checkpoints that DeepSpeed wrote, read without it and without the ranks that wrote them, into portable ones.

DeepSpeed keeps the optimizer's ``state_dict`` somewhere in a file a rank. Which part of which state its tensors are,
the optimizer has written beside them. The files are pickles that also hold objects of DeepSpeed's; these become empty
objects, and no code of a file's choice runs.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from muon_dist.checkpoint.contents import Contents, options_to_json, tensor_key, versions
from muon_dist.checkpoint.pieces import Piece, merged
from muon_dist.checkpoint.seal import MANIFEST, begin, finish, verify
from muon_dist.checkpoint.storage import write
from muon_dist.options import Options

DESCRIPTION = "muon_dist"  # in the optimizer's state_dict
# Under one of these in each other, DeepSpeed's stages keep it.
_KEYS = ("optimizer", "optimizer_state_dict", "base_optimizer_state")
_ZERO_FILES = "*zero_pp_rank_*_mp_rank_*_optim_states.pt"
_STAGE_0_FILES = "mp_rank_*_model_states.pt"


class StoredPiece(NamedTuple):
    """A piece, and where its tensors are in the state_dict: the place of the parameter, and names by the codec's; none
    for an empty piece."""

    piece: Piece
    place: int
    entries: Mapping[str, str]


def description_of(pieces: Sequence[StoredPiece], options: Options) -> dict[str, Any]:
    """What is written beside the state of a rank, as plain data."""
    described = [{"piece": p.piece.to_json(), "place": p.place, "entries": dict(p.entries)} for p in pieces]
    return {"pieces": described, "options": options_to_json(options)}


def is_deepspeed(folder: Path) -> bool:
    """Whether DeepSpeed wrote a checkpoint, or several, into ``folder``."""
    return bool(_optimizer_files(folder))


def to_portable(source: Path, folder: Path) -> None:
    """Writes the optimizer's state of a checkpoint of DeepSpeed's as a portable one. A process alone does it.

    Args:
        source: what was given to ``engine.save_checkpoint``, of which the latest is taken, or the folder of one tag.

    Raises:
        ValueError: ``source`` is damaged, not whole or not of DistMuon; ``folder`` exists.
    """
    if (source / MANIFEST).exists():  # of muon-dist train
        verify(source, None)
    files = _optimizer_files(source)
    everyones: list[list[Piece]] = []
    tensors: dict[str, Tensor] = {}
    for file in files:
        state_dict = _state_dict(file)
        options = state_dict[DESCRIPTION]["options"]
        described = state_dict[DESCRIPTION]["pieces"]
        everyones.append([Piece.from_json(where["piece"]) for where in described])
        for piece, where in zip(everyones[-1], described, strict=True):
            state = state_dict["state"][where["place"]]
            for buffer, entry in where["entries"].items():
                tensors[tensor_key(piece.name, piece.label, piece.region, buffer)] = state[entry]
    _require_whole(source, files, everyones)
    contents = Contents(merged(everyones, options["rank_fraction"]), options, len(files), versions())
    aside = begin(folder, None)
    write(tensors, aside, None)
    finish(aside, folder, contents.to_json(), None)


def _optimizer_files(source: Path) -> list[Path]:
    """One a rank, or of stage 0 the one of all of them."""
    latest = source / "latest"
    folder = source / latest.read_text().strip() if latest.is_file() else source
    return sorted(folder.glob(_ZERO_FILES)) or sorted(folder.glob(_STAGE_0_FILES))


def _state_dict(file: Path) -> dict[str, Any]:
    """The optimizer's, as it was given to DeepSpeed."""
    try:
        inert = [(_Inert, name) for name in get_unsafe_globals_in_checkpoint(file)]
        with safe_globals(inert):  # type: ignore[arg-type]  # pairs of an object and a name are documented
            found: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    while isinstance(found, dict) and DESCRIPTION not in found:
        found = next((found[key] for key in _KEYS if key in found), None)
    if not isinstance(found, dict):
        raise ValueError(
            f"{file} holds no state that DistMuon has described: another optimizer's, or an older version's. Load it "
            f"in the engine, and save it with muon_dist.integrations.deepspeed.save_state"
        )
    return found


class _Inert:
    """Stands for any class or function that a file names."""

    def __new__(cls, *_: object, **__: object) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Drops it."""


def _require_whole(source: Path, files: Sequence[Path], everyones: Sequence[Sequence[Piece]]) -> None:
    """Raises ValueError where files are missing."""
    ranks = {rank for pieces in everyones for piece in pieces for rank in piece.ranks}
    if files[0].match(_ZERO_FILES) and len(files) != len(ranks):
        raise ValueError(
            f"{source} has the optimizer's state of {len(files)} ranks, {len(ranks)} wrote it: copy all of its files "
            f"into one folder"
        )
