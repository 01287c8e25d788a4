"""What a saved state must have to be loaded: the same parameters, in the same codecs and shapes; and where it goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from muon_dist.sharding import local


def require_same_members(saved: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError unless the saved groups have our algorithms and, where known, parameters."""
    described = [
        [(g.get("algorithm"), g.get("param_names") or f"{len(g['params'])} parameters") for g in groups]
        for groups in (saved, ours)
    ]
    if described[0] != described[1]:
        raise ValueError(
            f"the saved state has the groups {described[0]}, the optimizer {described[1]}; construct it with the "
            f"parameters, in the order and with the overrides, that the state was saved with"
        )


def require_matching(name: str, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises ValueError unless a parameter's saved state fits the one that the optimizer would have made."""
    if not saved:
        return
    if saved.keys() != ours.keys():
        raise ValueError(
            f"{name}: the saved state has {sorted(saved)}, the optimizer keeps {sorted(ours)}; construct it with the "
            f"momentum_state and adamw_state that the state was saved with"
        )
    for key, value in ours.items():
        theirs = saved[key]
        if isinstance(value, Tensor) and (theirs.shape != value.shape or theirs.dtype != value.dtype):
            raise ValueError(
                f"{name}: the saved {key} is {theirs.dtype} {tuple(theirs.shape)}, expected {value.dtype} "
                f"{tuple(value.shape)}; construct the optimizer with the block_size and layout that it was saved with"
            )


def loaded(value: Tensor, device: torch.device, place: Tensor | None) -> Tensor:
    """``value`` on ``device``, or in ``place``, page-locked memory, where there is such."""
    if place is None:
        return value.to(device)
    local(place).copy_(local(value))
    return place
