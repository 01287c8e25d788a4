"""Loading: each rank looks up the pieces that overlap with its own, and takes as much of them as it can as it is.

In this order: the same piece in the same codec is read code for code. Rows of the same codec, if it is row-wise, move
without decoding. Anything else is decoded, moved and encoded anew, and the error that this makes is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from muon_dist.agreement import gathered
from muon_dist.binding import Binding
from muon_dist.checkpoint.contents import Contents, group_from_json
from muon_dist.checkpoint.saved import SavedTensor
from muon_dist.checkpoint.seal import verify
from muon_dist.checkpoint.storage import TensorReader
from muon_dist.names import plain_name
from muon_dist.optimizer import DistMuon
from muon_dist.regions import Box, Region
from muon_dist.state import StoredTensor

_SHOWN = 10
How = Literal["restored", "moved", "encoded"]  # from the best to the worst


class Outcome(NamedTuple):
    """How one rank got its part of a state; sums of squares of the error that encoding made, and of the values."""

    how: How
    error: float = 0.0
    values: float = 0.0


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, and how; the same on all ranks. States are named "parameter: state".

    Attributes:
        restored: states that every rank read code for code.
        moved: states whose rows moved to other ranks without being decoded.
        encoded: states that were decoded and encoded anew, with the relative error (Frobenius) that this made.
        skipped: parameters that were left as they were, with the reason; empty if ``strict``.
    """

    restored: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    encoded: Mapping[str, float] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The largest of them."""
        return max(self.encoded.values(), default=0.0)

    def __str__(self) -> str:
        lines = [
            f"{len(self.restored)} states restored code for code, {len(self.moved)} moved by rows, "
            f"{len(self.encoded)} decoded and encoded anew with a relative error of at most {self.error:.2g}"
        ]
        return "\n".join(lines + [f"skipped {name}: {reason}" for name, reason in self.skipped.items()])


@torch.no_grad()
def load_state(optimizer: DistMuon, folder: str | Path, *, strict: bool = True) -> LoadReport:
    """Loads what :func:`muon_dist.checkpoint.save_state` wrote, on whatever engine, world size and codecs. Call it on
    every rank. The groups' options (``lr`` and so on) are restored too, as by any torch optimizer.

    Args:
        strict: whether to raise if the parameters are not those of the checkpoint. If False, parameters that do not fit
            keep the state that they have, and the report says which and why.

    Raises:
        ValueError: the checkpoint is damaged or does not fit; on every rank, before anything is changed.
    """
    folder, group = Path(folder), optimizer.process_group
    contents = Contents.from_json(verify(folder, group))
    binding = optimizer.bound()
    names = set().union(*gathered({plain_name(shard.name) for shard in binding.shards}, group))
    absent = dict.fromkeys(contents.parameters.keys() - names, "is in the checkpoint, not in the optimizer")
    differences = _merged([absent, *gathered(_differences(contents, binding), group)])
    if strict and differences:
        raise ValueError(
            f"{folder} does not fit the optimizer; construct it with the model, the groups and the overrides that it "
            f"was saved with, or skip what differs with strict=False:\n" + "\n".join(_listed(differences))
        )
    reader = TensorReader(folder)
    outcomes: dict[str, Outcome] = {}
    for shard, stored in binding.stored():
        name = plain_name(shard.name)
        if stored.layout.region.numel and name not in differences:
            saved = SavedTensor(reader, name, stored.label, contents.parameters[name].states[stored.label])
            outcomes[f"{name}: {stored.label}"] = _load(saved, stored, stored.buffers(shard.state))
    for group_, options in _group_options(contents, binding):
        if len(options) == 1:
            _restore(group_, options[0])
    return _report(gathered(outcomes, group), differences)


def _differences(contents: Contents, binding: Binding) -> dict[str, str]:
    """What does not fit on this rank, by parameter."""
    found = {}
    for shard in binding.shards:
        name, saved = plain_name(shard.name), contents.parameters.get(plain_name(shard.name))
        if saved is None:
            found[name] = "is in the optimizer, not in the checkpoint"
        elif saved.shape != shard.shape:
            found[name] = f"has shape {shard.shape}, in the checkpoint {saved.shape}"
        elif saved.algorithm != shard.group["algorithm"]:
            found[name] = f"goes to {shard.group['algorithm']}, in the checkpoint to {saved.algorithm}"
    for group, options in _group_options(contents, binding):
        if len(options) > 1:
            name = next(plain_name(shard.name) for shard in binding.shards if shard.group is group)
            found[f"the group of {name}"] = f"has members from groups with other options: {options[0]} and {options[1]}"
    return found


def _group_options(contents: Contents, binding: Binding) -> list[tuple[dict[str, Any], list[Mapping[str, Any]]]]:
    """Every group, and the options that the checkpoint has for its members: one set of them, as a rule."""
    found: dict[int, tuple[dict[str, Any], list[Mapping[str, Any]]]] = {}
    for shard in binding.shards:
        saved = contents.parameters.get(plain_name(shard.name))
        _, options = found.setdefault(id(shard.group), (shard.group, []))
        if saved is not None and saved.options not in options:
            options.append(saved.options)
    return list(found.values())


def _restore(group: dict[str, Any], options: Mapping[str, Any]) -> None:
    for option, value in group_from_json(options).items():
        if isinstance(group[option], Tensor):
            group[option].fill_(value)  # a learning rate that a compiled step refers to
        else:
            group[option] = value


def _load(saved: SavedTensor, ours: StoredTensor, buffers: Mapping[str, Tensor]) -> Outcome:
    """Fills this rank's buffers of one state."""
    region = ours.layout.region
    overlapping = saved.overlapping(region)
    same_codec = all(saved.codec_of(piece) == ours.codec for piece in overlapping)
    if same_codec and region in overlapping:
        saved.read_into(region, buffers)
        return Outcome("restored")
    if same_codec and ours.codec.row_wise and all(_same_columns(piece, region) for piece in overlapping):
        for piece in overlapping:
            _move_rows(saved.read(piece, ours.layout.device), piece, buffers, region)
        return Outcome("moved")
    values = saved.values(region, ours.layout.device)
    ours.encode(values, buffers)
    error = ours.codec.decode(buffers, (1, *region.local_shape)[-1]) - values
    return Outcome("encoded", float(error.double().square().sum()), float(values.double().square().sum()))


def _same_columns(one: Region, other: Region) -> bool:
    """Whether rows of one are rows of the other."""
    return not (one.flat or other.flat) and (one.offset[-1], one.size[-1]) == (other.offset[-1], other.size[-1])


def _move_rows(source: Mapping[str, Tensor], piece: Region, target: Mapping[str, Tensor], region: Region) -> None:
    """Copies the rows that both regions have, as they are stored. Of the last dimension buffers have what they like."""
    theirs, ours = (Box(r.offset[:-1], r.size[:-1]) for r in (piece, region))
    rows = theirs.intersection(ours)
    assert rows is not None  # they overlap
    for key, tensor in target.items():
        tensor[rows.slices_in(ours)].copy_(source[key][rows.slices_in(theirs)])


def _merged(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    found = {name: reason for part in parts for name, reason in part.items()}
    return dict(sorted(found.items()))


def _listed(differences: Mapping[str, str]) -> list[str]:
    lines = [f"  {name} {reason}" for name, reason in differences.items()]
    return lines if len(lines) <= _SHOWN else [*lines[:_SHOWN], f"  and {len(lines) - _SHOWN} more"]


def _report(everyones: Iterable[Mapping[str, Outcome]], differences: Mapping[str, str]) -> LoadReport:
    found: dict[str, list[Outcome]] = {}
    for outcomes in everyones:
        for state, outcome in outcomes.items():
            found.setdefault(state, []).append(outcome)
    worst = {state: max((o.how for o in parts), key=get_args(How).index) for state, parts in found.items()}
    restored, moved = (tuple(s for s, how in worst.items() if how == kind) for kind in ("restored", "moved"))
    errors = {
        state: math.sqrt(sum(o.error for o in found[state]) / (sum(o.values for o in found[state]) or 1.0))
        for state, how in worst.items()
        if how == "encoded"
    }
    return LoadReport(restored, moved, errors, differences)
