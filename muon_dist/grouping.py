"""Which parameter goes to Muon and which to AdamW, and why.

Muon is for hidden matrices: weights that map activations to activations. Embeddings and output heads are matrices
too, but their rows are looked up or compared one by one, and vectors have no singular directions to equalise: these
train with AdamW (Keller Jordan, "Muon: An optimizer for hidden layers in neural networks"). Embeddings and heads are
known by their names only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias, get_args

from torch import Tensor

from muon_dist.options import Algorithm

WholeShape: TypeAlias = Callable[[Tensor], tuple[int, ...]]

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
    shape: tuple[int, ...]  # of the whole, where engines leave less in the parameter
    algorithm: Algorithm
    reason: str


class Grouping(list[Assignment]):
    """All assignments; prints as a table."""

    def __str__(self) -> str:
        rows = [(a.name, "x".join(map(str, a.shape)) or "scalar", a.algorithm, a.reason) for a in self]
        header = ("parameter", "shape", "algorithm", "why")
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in [header, *rows]
        ]
        for algorithm in get_args(Algorithm):
            chosen = [math.prod(a.shape) for a in self if a.algorithm == algorithm]
            lines.append(f"{algorithm}: {len(chosen)} parameters, {sum(chosen):,} elements")
        return "\n".join(lines)


def shape_as_is(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a tensor that is all of the parameter, or a DTensor."""
    return tuple(parameter.shape)


def assign(
    named_parameters: Iterable[tuple[str | None, Tensor]],
    overrides: Mapping[str, Algorithm] | None = None,
    whole_shape: WholeShape = shape_as_is,
) -> Grouping:
    """Decides for each parameter.

    Args:
        named_parameters: as from ``model.named_parameters()``; the name may be None where it is not known.
        overrides: ``{pattern: algorithm}`` with shell-style patterns on the whole name, such as
            ``{"*.router.weight": "adamw"}``. The first match wins over the rules.
        whole_shape: of a parameter, for engines that keep it in pieces.

    Raises:
        ValueError: an override sends a parameter to Muon that is no matrix.
    """
    grouping = Grouping()
    for position, (name, parameter) in enumerate(named_parameters):
        pattern = next((p for p in overrides or {} if name is not None and fnmatchcase(name, p)), None)
        shown = name if name is not None else f"parameter {position}"
        shape = whole_shape(parameter)
        if overrides and pattern is not None:
            algorithm, reason = overrides[pattern], f"matches the override {pattern!r}"
            if algorithm == "muon":
                require_matrix(shown, shape)
        else:
            algorithm, reason = _rule(name, shape)
        grouping.append(Assignment(shown, parameter, shape, algorithm, reason))
    return grouping


def require_matrix(name: str, shape: Sequence[int]) -> None:
    """Raises ValueError unless a parameter of ``shape`` is one that Muon can take."""
    if len(shape) != 2:
        raise ValueError(
            f"{name} has shape {tuple(shape)}; Muon takes matrices (2-D). Give it to AdamW: "
            f'a group with algorithm="adamw", or overrides={{{name!r}: "adamw"}}'
        )


def _rule(name: str | None, shape: Sequence[int]) -> tuple[Algorithm, str]:
    if len(shape) < 2:
        return "adamw", "a vector" if shape else "a scalar"
    if len(shape) > 2:
        return "adamw", f"{len(shape)}-D, not a matrix"
    if name is None:
        return "muon", "a matrix of unknown name"
    ends = set(name.split(".")[-2:])  # "lm_head.weight", or a bare parameter "pos_embed"
    if ends & _EMBEDDING_MODULES or name in _TOP_EMBEDDINGS:
        return "adamw", "an embedding, by its name"
    if ends & _HEAD_MODULES or name in _TOP_HEADS:
        return "adamw", "an output head, by its name"
    return "muon", "a hidden matrix"
