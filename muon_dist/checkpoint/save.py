"""Saving: every rank writes the pieces that it has, replicas share theirs out, and nothing is gathered or decoded.

Either the caller waits, or a thread writes a copy of them while training goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor

from muon_dist.agreement import gathered
from muon_dist.binding import Binding
from muon_dist.checkpoint.background import Background, on_host
from muon_dist.checkpoint.contents import Contents, options_to_json, tensor_key, versions
from muon_dist.checkpoint.pieces import Piece, merged, pieces_of
from muon_dist.checkpoint.seal import begin, finish
from muon_dist.checkpoint.storage import write
from muon_dist.names import plain_name
from muon_dist.optimizer import DistMuon
from muon_dist.regions import Region


def save_state(optimizer: DistMuon, folder: str | Path) -> None:
    """Writes the optimizer's state and its groups' options. Call it on every rank; ``folder`` must be one that all see.

    ``folder`` appears when all of it is on the disk, and not before: a job that is killed leaves no half of it.

    Raises:
        ValueError: ``folder`` exists, or two parameters of the job have one name; on every rank.
    """
    folder, group = Path(folder), optimizer.process_group
    tensors, contents = _collect(optimizer)
    _write(tensors, contents, begin(folder, group), folder, group)


def async_save(optimizer: DistMuon, folder: str | Path) -> Future[None]:
    """As :func:`save_state`, but returns when there is a copy of this rank's state in host memory: a thread writes
    it while training goes on. A save that is still under way is waited for first, and what it raised is raised.

    Returns:
        What tells when ``folder`` is there: ``result()`` waits for it, and raises what went wrong. Call it before the
        process group is destroyed.

    Raises:
        ValueError: as by :func:`save_state`, at once.
    """
    folder, group = Path(folder), optimizer.process_group
    if optimizer not in _backgrounds:
        _backgrounds[optimizer] = Background(group)
    background = _backgrounds[optimizer]
    background.wait()
    tensors, contents = _collect(optimizer)
    aside = begin(folder, group)
    return background.start(partial(_write, on_host(tensors), contents, aside, folder))


_backgrounds: WeakKeyDictionary[DistMuon, Background] = WeakKeyDictionary()


def _collect(optimizer: DistMuon) -> tuple[dict[str, Tensor], Contents]:
    """What this rank writes, and what all of them write. Collective."""
    group, binding = optimizer.process_group, optimizer.bound()
    everyones = gathered(pieces_of(binding), group)
    parameters = merged(everyones, optimizer.options.rank_fraction)
    contents = Contents(parameters, options_to_json(optimizer.options), len(everyones), versions())
    return _tensors(binding, _writers(everyones), 0 if group is None else group.rank()), contents


def _write(
    tensors: dict[str, Tensor], contents: Contents, aside: Path, folder: Path, group: dist.ProcessGroup | None
) -> None:
    write(tensors, aside, group)
    finish(aside, folder, contents.to_json(), group)


def _writers(everyones: Sequence[Sequence[Piece]]) -> dict[tuple[str, str, Region], int]:
    """Which rank writes a piece: its holders by turns."""
    holders: dict[tuple[str, str, Region], list[int]] = {}
    for rank, pieces in enumerate(everyones):
        for piece in pieces:
            if piece.region.numel:
                holders.setdefault(piece[:3], []).append(rank)
    return {key: ranks[turn % len(ranks)] for turn, (key, ranks) in enumerate(holders.items())}


def _tensors(binding: Binding, writers: dict[tuple[str, str, Region], int], rank: int) -> dict[str, Tensor]:
    """What this rank writes, by the names it is stored under."""
    return {
        tensor_key(name, stored.label, region, buffer): tensor
        for shard, stored in binding.stored()
        for name, region in [(plain_name(shard.name), stored.layout.region)]
        if region.numel and writers[name, stored.label, region] == rank
        for buffer, tensor in stored.buffers(shard.state).items()
    }
