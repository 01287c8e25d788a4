"""The parameters of a model that is not built: from a preset, a config of transformers, or a table of shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from muon_dist.launch.config import ModelName, UsageError


def read_shapes(model: str) -> dict[str, Tensor]:
    """Parameters on the meta device, by name.

    Args:
        model: a preset's name; a file or folder with a ``config.json`` of transformers; a JSON file of shapes by name,
            ``{"model.layers.0.mlp.up_proj.weight": [4096, 1024]}``; or else a model's id on the Hugging Face hub, of
            which the config alone is fetched.

    Raises:
        UsageError: it is none of these.
    """
    if model in get_args(ModelName):
        return _of_preset(model)
    path = Path(model)
    if path.suffix == ".json" and path.is_file():
        entries = json.loads(path.read_text())
        if "model_type" not in entries:
            return {name: _meta(name, shape) for name, shape in entries.items()}
    return _of_config(model)


def _meta(name: str, shape: Any) -> Tensor:
    if not isinstance(shape, list) or not all(isinstance(size, int) and size > 0 for size in shape):
        raise UsageError(f"{name}: {shape!r} is no shape; a file of shapes has lists of positive numbers by name")
    return torch.empty(shape, device="meta")


def _of_preset(name: Any) -> dict[str, Tensor]:
    from muon_dist.launch.models import build_model

    return dict(build_model(name, 128, torch.device("meta"), seed=0).named_parameters())


def _of_config(source: str) -> dict[str, Tensor]:
    try:
        import transformers
    except ImportError as error:
        raise UsageError(f"{error}; reading a config needs transformers: pip install 'muon_dist[train]'") from None
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        presets = ", ".join(get_args(ModelName))
        raise UsageError(
            f"{source} is no preset ({presets}), no file of shapes, and transformers finds no config there: {error}"
        ) from None
    # The class that the config was written for; without one, the language model of this architecture.
    named = next(iter(config.architectures or ()), None)
    architecture: Any = getattr(transformers, named, None) if named else None
    build = architecture._from_config if architecture else transformers.AutoModelForCausalLM.from_config
    with torch.device("meta"):
        return dict(build(config).named_parameters())
