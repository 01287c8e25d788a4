"""Which parameter goes to Muon and which to AdamW, and why.

Muon is for hidden matrices: weights that map activations to activations. Embeddings and output heads are matrices
too, but their rows are looked up or compared one by one, and vectors have no singular directions to equalise: these
train with AdamW (Keller Jordan, "Muon: An optimizer for hidden layers in neural networks"). Embeddings and heads are
known by their names only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import get_args

from torch import Tensor

from muon_dist.options import Algorithm

# Names of the modules that hold embeddings and output heads, in transformers, torchtitan, timm and Megatron models.
_EMBEDDING_MODULES = frozenset(
    [
        "embed",
        "embedding",
        "embeddings",
        "embed_tokens",
        "tok_embeddings",
        "token_embedding",
        "word_embeddings",
        "wte",
        "wpe",
        "position_embeddings",
        "token_type_embeddings",
        "pos_embed",
        "embed_positions",
        "relative_attention_bias",
    ]
)
_HEAD_MODULES = frozenset(["lm_head", "embed_out", "output_layer", "unembed", "head", "classifier", "score"])
# Names that mean the same only at the top of a model: torchtitan's output head, T5's embedding.
_TOP_HEADS = frozenset({"output.weight", "model.output.weight"})
_TOP_EMBEDDINGS = frozenset({"shared.weight", "model.shared.weight"})


@dataclass(frozen=True)
class Assignment:
    """One parameter's algorithm, and the reason in words."""

    name: str
    parameter: Tensor
    algorithm: Algorithm
    reason: str


class Grouping(list[Assignment]):
    """All assignments; prints as a table."""

    def __str__(self) -> str:
        rows = [(a.name, "x".join(map(str, a.parameter.shape)) or "scalar", a.algorithm, a.reason) for a in self]
        header = ("parameter", "shape", "algorithm", "why")
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in [header, *rows]
        ]
        for algorithm in get_args(Algorithm):
            chosen = [a.parameter.numel() for a in self if a.algorithm == algorithm]
            lines.append(f"{algorithm}: {len(chosen)} parameters, {sum(chosen):,} elements")
        return "\n".join(lines)


def assign(
    named_parameters: Iterable[tuple[str | None, Tensor]], overrides: Mapping[str, Algorithm] | None = None
) -> Grouping:
    """Decides for each parameter.

    Args:
        named_parameters: as from ``model.named_parameters()``; the name may be None where it is not known.
        overrides: ``{pattern: algorithm}`` with shell-style patterns on the whole name, such as
            ``{"*.router.weight": "adamw"}``. The first match wins over the rules.

    Raises:
        ValueError: an override sends a parameter to Muon that is no matrix.
    """
    grouping = Grouping()
    for position, (name, parameter) in enumerate(named_parameters):
        pattern = next((p for p in overrides or {} if name is not None and fnmatchcase(name, p)), None)
        shown = name if name is not None else f"parameter {position}"
        if overrides and pattern is not None:
            algorithm, reason = overrides[pattern], f"matches the override {pattern!r}"
            if algorithm == "muon":
                require_matrix(shown, parameter)
        else:
            algorithm, reason = _rule(name, parameter)
        grouping.append(Assignment(shown, parameter, algorithm, reason))
    return grouping


def require_matrix(name: str, parameter: Tensor) -> None:
    """Raises ValueError unless ``parameter`` is one that Muon can take."""
    if parameter.ndim != 2:
        raise ValueError(
            f"{name} has shape {tuple(parameter.shape)}; Muon takes matrices (2-D). Give it to AdamW: "
            f'a group with algorithm="adamw", or overrides={{{name!r}: "adamw"}}'
        )


def _rule(name: str | None, parameter: Tensor) -> tuple[Algorithm, str]:
    if parameter.ndim < 2:
        return "adamw", "a vector" if parameter.ndim == 1 else "a scalar"
    if parameter.ndim > 2:
        return "adamw", f"{parameter.ndim}-D, not a matrix"
    if name is None:
        return "muon", "a matrix of unknown name"
    ends = set(name.split(".")[-2:])  # "lm_head.weight", or a bare parameter "pos_embed"
    if ends & _EMBEDDING_MODULES or name in _TOP_EMBEDDINGS:
        return "adamw", "an embedding, by its name"
    if ends & _HEAD_MODULES or name in _TOP_HEADS:
        return "adamw", "an output head, by its name"
    return "muon", "a hidden matrix"
