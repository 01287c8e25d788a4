"""Parameter groups: what users may pass, turned into groups of one algorithm each, with all their options, checked."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from muon_dist.forms import Forms
from muon_dist.grouping import Assignment, Grouping, WholeShape, assign, shape_as_is, shape_of
from muon_dist.options import Algorithm, UpdateScale, require_one_of

# Options of a group, in the order of the constructor. All groups carry all of them, whatever their algorithm:
# schedulers and checkpoints expect groups to have the same keys.
GROUP_OPTIONS = ("lr", "momentum", "nesterov", "weight_decay", "update_scale", "betas", "eps")
# What a group without an algorithm may say about its AdamW part.
ADAMW_OPTIONS = {"adamw_lr": "lr", "adamw_betas": "betas", "adamw_eps": "eps", "adamw_weight_decay": "weight_decay"}


@dataclass(frozen=True)
class Defaults:
    """Values that a group takes where it does not give its own."""

    muon: Mapping[str, Any]
    adamw: Mapping[str, Any]


def resolve_group(
    group: Mapping[str, Any],
    defaults: Defaults,
    overrides: Mapping[str, Algorithm] | None,
    forms: Forms,
    whole_shape: WholeShape = shape_as_is,
) -> tuple[list[dict[str, Any]], Grouping]:
    """Splits a group by algorithm and fills in its options.

    Args:
        group: as for any torch optimizer: ``params`` (tensors or (name, tensor) pairs) and options. With
            ``algorithm="muon" | "adamw"`` all of it goes there; without, each parameter by the rules of
            ``grouping.py``. Keys that are no options are carried along.
        forms: which matrices parameters are made of.
        whole_shape: of a parameter, for engines that keep it in pieces.

    Returns:
        One to three groups for ``torch.optim.Optimizer.add_param_group``, and why each parameter is where it is.

    Raises:
        ValueError, TypeError: naming the parameter or option, and the fix.
    """
    _require_known_keys(group)
    for algorithm in (overrides or {}).values():
        require_one_of("overrides", algorithm, get_args(Algorithm))
    named = _named(group)
    chosen = group.get("algorithm")
    if chosen is None:
        grouping = assign(named, overrides, forms, whole_shape)
        _warn_of_unknown_names(named, grouping)
    else:
        require_one_of("algorithm", chosen, get_args(Algorithm))
        grouping = Grouping(
            Assignment.of(_shown(n, i), p, shape_of(_shown(n, i), p, whole_shape), chosen, "its group's choice", forms)
            for i, (n, p) in enumerate(named)
        )
    extra = {k: v for k, v in group.items() if k not in (*GROUP_OPTIONS, *ADAMW_OPTIONS, "params", "param_names")}
    resolved = []
    for algorithm in get_args(Algorithm):
        options = _options(group, algorithm, defaults, shared=chosen is None)
        # Vectors and scalars are not decayed but by a group that was made for AdamW.
        apart = chosen is None and algorithm == "adamw" and options["weight_decay"] != 0
        for vectors in (False, True) if apart else (None,):
            members = [
                pair
                for pair, a in zip(named, grouping, strict=True)
                if a.algorithm == algorithm and vectors in (None, len(a.shape) < 2)
            ]
            if members:
                if vectors:
                    options = {**options, "weight_decay": 0.0}
                params = members if members[0][0] is not None else [p for _, p in members]
                resolved.append({**extra, **options, "algorithm": algorithm, "params": params})
    return resolved, grouping


def _options(group: Mapping[str, Any], algorithm: Algorithm, defaults: Defaults, shared: bool) -> dict[str, Any]:
    """All options of the part of ``group`` that goes to ``algorithm``; ``shared`` when the other part may exist too."""
    options = dict(defaults.muon if algorithm == "muon" else defaults.adamw)
    # A learning rate for orthogonal updates means nothing to AdamW, so a shared group's goes to its Muon part alone.
    own = [o for o in GROUP_OPTIONS if not (shared and algorithm == "adamw" and o == "lr")]
    options.update({o: group[o] for o in own if o in group})
    if algorithm == "adamw":
        options.update({o: group[key] for key, o in ADAMW_OPTIONS.items() if key in group})
    check_options(options)
    return options


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError for a value that a group's option cannot take."""
    if not float(options["lr"]) >= 0:
        raise ValueError(f"lr={options['lr']}: a learning rate must be 0 or more")
    if not 0 <= options["momentum"] < 1:
        raise ValueError(f"momentum={options['momentum']}: it must be at least 0 and less than 1")
    if not options["weight_decay"] >= 0:
        raise ValueError(f"weight_decay={options['weight_decay']}: it must be 0 or more")
    if len(options["betas"]) != 2 or not all(0 <= beta < 1 for beta in options["betas"]):
        raise ValueError(f"betas={options['betas']}: two numbers, each at least 0 and less than 1")
    if not options["eps"] > 0:
        raise ValueError(f"eps={options['eps']}: it must be more than 0")
    require_one_of("update_scale", options["update_scale"], get_args(UpdateScale))


def _require_known_keys(group: Mapping[str, Any]) -> None:
    """Refuses keys that look like a misspelt option; torch carries unknown keys along for schedulers and trainers."""
    known = (*GROUP_OPTIONS, *ADAMW_OPTIONS, "algorithm", "params", "param_names")
    for key in group:
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if key not in known and close:
            raise ValueError(f"a parameter group has no option {key!r}; did you mean {close[0]!r}?")


def _named(group: Mapping[str, Any]) -> list[tuple[str | None, Tensor]]:
    """The group's parameters with their names, or None for a name; each a floating-point tensor that occurs once."""
    params = group["params"]
    entries: Iterable[Any] = [params] if isinstance(params, Tensor) else params
    if isinstance(entries, set):
        raise TypeError("parameters must be in a list or another ordered collection; the order of a set is not stable")
    named: list[tuple[str | None, Tensor]] = [e if isinstance(e, tuple) else (None, e) for e in entries]
    if "param_names" in group:
        named = [(name, p) for name, (_, p) in zip(group["param_names"], named, strict=True)]
    seen: dict[int, str] = {}
    for position, (name, p) in enumerate(named):
        shown = _shown(name, position)
        if not isinstance(p, Tensor):
            raise TypeError(f"{shown} is a {type(p).__name__}; an optimizer takes tensors")
        if not p.is_floating_point():
            raise ValueError(f"{shown} is {p.dtype}; only floating-point parameters can be trained, leave it out")
        if p.dtype == torch.float64:
            raise ValueError(
                f"{shown} is torch.float64; the optimizer computes in fp32, convert the model with .float()"
            )
        if id(p) in seen:
            raise ValueError(f"{shown} is the same tensor as {seen[id(p)]}; give each parameter once")
        seen[id(p)] = shown
    return named


def _warn_of_unknown_names(named: list[tuple[str | None, Tensor]], grouping: Grouping) -> None:
    unknown = sum(1 for (name, _), a in zip(named, grouping, strict=True) if name is None and a.algorithm == "muon")
    if unknown:
        warnings.warn(
            f"the names of the parameters are not known: all {unknown} matrices go to Muon, embeddings and heads among "
            f"them. Pass model.named_parameters(), or groups with algorithm='muon' and 'adamw'",
            stacklevel=4,
        )


def _shown(name: str | None, position: int) -> str:
    return name if name is not None else f"parameter {position}"
