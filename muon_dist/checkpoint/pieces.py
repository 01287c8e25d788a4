"""Pieces of state, as the ranks have them, and the parameters that they make together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from muon_dist.binding import Binding
from muon_dist.checkpoint.contents import (
    SavedParameter,
    SavedState,
    extent_from,
    group_to_json,
    region_from,
)
from muon_dist.layout import Extent
from muon_dist.names import plain_name
from muon_dist.options import Algorithm
from muon_dist.regions import Region


class Piece(NamedTuple):
    """One rank's part of one state."""

    name: str
    label: str
    region: Region
    codec: str
    block: int
    extent: Extent | None
    splits: tuple[int, ...]
    shape: tuple[int, ...]  # of the parameter
    algorithm: Algorithm
    options: dict[str, Any]
    ranks: tuple[int, ...]  # over which the parameter lies

    def to_json(self) -> dict[str, Any]:
        """Plain data, which nothing has to be imported for."""
        return {**self._asdict(), "region": tuple(self.region), "extent": self.extent and tuple(self.extent)}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Piece:
        """The inverse of :meth:`to_json`."""
        return cls(**{**entry, "region": region_from(entry["region"]), "extent": extent_from(entry["extent"])})


def pieces_of(binding: Binding) -> list[Piece]:
    """What this rank has, as ``binding.stored()`` lists it; empty parts too, so that the parameters' order is known."""
    return [
        Piece(
            plain_name(shard.name),
            stored.label,
            stored.layout.region,
            stored.codec.name,
            stored.layout.block,
            None if stored.layout.region.flat else stored.layout.extent,
            stored.layout.form.splits if stored.layout.form else (),
            shard.shape,
            shard.group["algorithm"],
            group_to_json(shard.group),
            shard.ranks,
        )
        for shard, stored in binding.stored()
    ]


def merged(everyones: Sequence[Sequence[Piece]], rank_fraction: float | None) -> dict[str, SavedParameter]:
    """The job's parameters, from the pieces of all ranks.

    Raises:
        ValueError: pieces of one name that do not make one parameter.
    """
    found: dict[str, dict[str, list[Piece]]] = {}
    for piece in (piece for pieces in everyones for piece in pieces):
        found.setdefault(piece.name, {}).setdefault(piece.label, []).append(piece)
    parameters = {}
    for name, labels in found.items():
        states = {label: _merge_state(name, pieces, rank_fraction) for label, pieces in labels.items()}
        first = next(iter(labels.values()))[0]  # ranks have agreed on what is not the region: any piece speaks for all
        parameters[name] = SavedParameter(first.shape, first.algorithm, first.options, states)
    return parameters


def _merge_state(name: str, pieces: Sequence[Piece], rank_fraction: float | None) -> SavedState:
    """Raises ValueError unless the pieces are all of one tensor, each element once."""
    first = pieces[0]
    regions = sorted({piece.region for piece in pieces if piece.region.numel})
    homes = sorted({piece.ranks for piece in pieces})
    if len(homes) > 1 or sum(region.numel for region in regions) != math.prod(first.region.shape):
        where = " and ".join(str(list(ranks)) for ranks in homes)
        raise ValueError(
            f"{name} is the name of several parameters, which lie on ranks {where}: experts, as a rule. A portable "
            f"checkpoint needs a name for each; give the optimizer names that tell them apart"
        )
    return SavedState(first.codec, first.block, tuple(regions), first.extent, rank_fraction, first.splits)
