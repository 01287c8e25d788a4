"""Between portable checkpoints and the state of torch's own optimizers, in one process and one file.

The file is what ``torch.save({"muon": ..., "adamw": ...})`` writes of the ``state_dict`` of a ``torch.optim.Muon`` and
of a ``torch.optim.AdamW`` that were given ``named_parameters``: fp32 momentum and moments of whole parameters. torch's
Muon keeps the same moving average of gradients, so momentum carries over as it is.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from muon_dist.checkpoint.contents import Contents, SavedParameter, SavedState, tensor_key, versions
from muon_dist.checkpoint.saved import SavedTensor
from muon_dist.checkpoint.seal import begin, finish, verify
from muon_dist.checkpoint.storage import TensorReader, write
from muon_dist.names import plain_name
from muon_dist.options import Algorithm
from muon_dist.regions import Region
from muon_dist.state import FIRST_MOMENT, MOMENTUM, SECOND_MOMENT, STEP_COUNT

# States and group options that torch's optimizers have under the same names and with the same meaning.
_STATES: dict[Algorithm, tuple[str, ...]] = {"muon": (MOMENTUM,), "adamw": (FIRST_MOMENT, SECOND_MOMENT, STEP_COUNT)}
_OPTIONS: dict[Algorithm, tuple[str, ...]] = {
    "muon": ("lr", "weight_decay", "momentum", "nesterov"),
    "adamw": ("lr", "weight_decay", "betas", "eps"),
}


def to_torch(folder: Path, file: Path) -> None:
    """Writes the state of a portable checkpoint as torch's optimizers keep it.

    Raises:
        ValueError: the checkpoint is damaged, or has momenta of stacks or convolutions, which torch's Muon does not
            take.
        FileExistsError: ``file`` exists.
    """
    contents = Contents.from_json(verify(folder, None))
    for name, saved in contents.parameters.items():
        if saved.algorithm == "muon" and len(saved.shape) != 2:
            raise ValueError(
                f"{name} has shape {saved.shape}, and torch.optim.Muon takes matrices only: load {folder} into DistMuon"
            )
    reader = TensorReader(folder)
    with file.open("xb") as target:
        torch.save({algorithm: _state_dict(contents, reader, algorithm) for algorithm in _STATES}, target)


def from_torch(file: Path, folder: Path) -> None:
    """Writes what :func:`to_torch` writes, or the two optimizers' ``state_dict``, as a portable checkpoint.

    Raises:
        ValueError: the file holds something else, or its parameters have no names; ``folder`` exists.
    """
    parameters: dict[str, SavedParameter] = {}
    tensors: dict[str, Tensor] = {}
    try:
        state_dicts = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{file} cannot be read as a file of torch.save: {error}") from None
    for algorithm in _STATES:
        for name, options, state in _entries(file, state_dicts, algorithm):
            values = {label: state[label].float().contiguous() for label in _STATES[algorithm]}
            shape = tuple(next(iter(values.values())).shape)
            regions = {label: _whole(tuple(value.shape)) for label, value in values.items()}
            states = {label: SavedState("fp32", 1, (region,)) for label, region in regions.items()}
            parameters[name] = SavedParameter(shape, algorithm, options, states)
            tensors |= {tensor_key(name, label, regions[label], ""): value for label, value in values.items()}
    aside = begin(folder, None)
    write(tensors, aside, None)
    finish(aside, folder, Contents(parameters, {}, 1, versions()).to_json(), None)


def _state_dict(contents: Contents, reader: TensorReader, algorithm: Algorithm) -> dict[str, Any]:
    """As the optimizer of torch's makes it itself, of parameters that are shapes only."""
    groups: list[dict[str, Any]] = []
    states: list[tuple[Tensor, dict[str, Tensor]]] = []
    for name, saved in contents.parameters.items():
        if saved.algorithm == algorithm:
            options = {key: saved.options[key] for key in _OPTIONS[algorithm] if key in saved.options}
            parameter = nn.Parameter(torch.empty(saved.shape, device="meta"))
            if not groups or {k: v for k, v in groups[-1].items() if k != "params"} != options:
                groups.append({**options, "params": []})
            groups[-1]["params"].append((name, parameter))
            whole = {label: SavedTensor(reader, name, label, state) for label, state in saved.states.items()}
            states.append((parameter, {label: _values(tensor) for label, tensor in whole.items()}))
    if not groups:
        return {"state": {}, "param_groups": []}
    optimizer: Optimizer = Muon(groups) if algorithm == "muon" else AdamW(groups)
    optimizer.state.update(states)
    return optimizer.state_dict()


def _values(saved: SavedTensor) -> Tensor:
    return saved.values(_whole(saved.state.pieces[0].shape), torch.device("cpu"))


def _entries(
    file: Path, state_dicts: Mapping[str, Any], algorithm: Algorithm
) -> Iterator[tuple[str, dict[str, Any], Mapping[str, Tensor]]]:
    """Name, group options and state of every parameter."""
    if not isinstance(state_dicts, dict) or algorithm not in state_dicts:
        raise ValueError(
            f'{file} has no {algorithm!r}; save {{"muon": muon.state_dict(), "adamw": adamw.state_dict()}} in it with '
            f"torch.save"
        )
    for group in state_dicts[algorithm]["param_groups"]:
        if "param_names" not in group:
            raise ValueError(
                f"{file}: the parameters of {algorithm!r} have no names; make the optimizer with named_parameters()"
            )
        options = {key: group[key] for key in _OPTIONS[algorithm]}
        for name, key in zip(group["param_names"], group["params"], strict=True):
            if state := state_dicts[algorithm]["state"].get(key):
                yield plain_name(name), options, state


def _whole(shape: tuple[int, ...]) -> Region:
    return Region(shape, (0,) * len(shape), shape)
