"""Which parameter goes to Muon and which to AdamW, and why.

Muon is for hidden matrices: weights that map activations to activations, alone, in stacks of experts, or as
convolutions. Embeddings and output heads are matrices too, but their rows are looked up or compared one by one, and
vectors have no singular directions to equalise: these train with AdamW (Keller Jordan, "Muon: An optimizer for hidden
layers in neural networks"). Embeddings, heads and experts are known by their names only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, get_args

from torch import Tensor

from muon_dist.forms import Form, Forms, is_expert, is_stack
from muon_dist.names import matches, plain_name
from muon_dist.options import Algorithm

WholeShape: TypeAlias = Callable[[Tensor], tuple[int, ...]]

# Names of the modules that hold embeddings and output heads, in transformers, torchtitan, timm and Megatron models.
_EMBEDDING_MODULES = frozenset(
    [
        "embed",
        "embedding",
        "embeddings",
        "embed_tokens",
        "embed_in",
        "tok_embeddings",
        "token_embedding",
        "word_embeddings",
        "wte",
        "wpe",
        "position_embeddings",
        "token_type_embeddings",
        "pos_embed",
        "embed_positions",
        "patch_embed",
        "patch_embedding",
        "patch_embeddings",
        "relative_attention_bias",
    ]
)
_HEAD_MODULES = frozenset(["lm_head", "embed_out", "output_layer", "unembed", "head", "classifier", "score"])
# Names that mean the same only at the top of a model: torchtitan's output head, T5's embedding.
_TOP_HEADS = frozenset({"output.weight", "model.output.weight"})
_TOP_EMBEDDINGS = frozenset({"shared.weight", "model.shared.weight"})
# What parameters are marked with when they are flattened together.
_FLATTENED = ("_fsdp_flattened", "_is_flat_param")


@dataclass(frozen=True)
class Assignment:
    """One parameter's algorithm, and the reason in words.

    Attributes:
        shape: of the whole, where engines leave less in the parameter.
        form: the matrices in it, for Muon.
    """

    name: str
    parameter: Tensor
    shape: tuple[int, ...]
    algorithm: Algorithm
    reason: str
    form: Form | None

    @classmethod
    def of(
        cls, name: str, parameter: Tensor, shape: tuple[int, ...], algorithm: Algorithm, reason: str, forms: Forms
    ) -> Assignment:
        """Raises ValueError for what Muon cannot take."""
        return cls(name, parameter, shape, algorithm, reason, forms.of(name, shape) if algorithm == "muon" else None)

    def with_adamw(self) -> Assignment:
        """The same parameter, were it AdamW's."""
        return replace(self, algorithm="adamw", form=None)


class Grouping(list[Assignment]):
    """All assignments; prints as a table."""

    def __str__(self) -> str:
        header = ("parameter", "shape", "algorithm", "matrices", "why")
        rows = [
            (a.name, "x".join(map(str, a.shape)) or "scalar", a.algorithm, str(a.form or "-"), a.reason) for a in self
        ]
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(4)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]])
            for row in [header, *rows]
        ]
        for algorithm in get_args(Algorithm):
            chosen = [a for a in self if a.algorithm == algorithm]
            matrices = f"{sum(a.form.count for a in chosen if a.form)} matrices, " if algorithm == "muon" else ""
            elements = sum(math.prod(a.shape) for a in chosen)
            lines.append(f"{algorithm}: {len(chosen)} parameters, {matrices}{elements:,} elements")
        return "\n".join(lines)


def shape_as_is(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a tensor that is all of the parameter, or a DTensor.

    Raises:
        ValueError: it is a part of one, or several.
    """
    if any(getattr(parameter, mark, False) for mark in _FLATTENED):
        raise ValueError(
            "an engine has flattened it, so matrices are not seen as such; make the optimizer with the class that "
            "muon_dist.integrations has for this engine"
        )
    return tuple(parameter.shape)


def shape_of(name: str, parameter: Tensor, whole_shape: WholeShape) -> tuple[int, ...]:
    """The shape of the whole; raises ValueError by name."""
    try:
        return whole_shape(parameter)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def assign(
    named_parameters: Iterable[tuple[str | None, Tensor]],
    overrides: Mapping[str, Algorithm] | None = None,
    forms: Forms = Forms(),  # noqa: B008 - it is frozen
    whole_shape: WholeShape = shape_as_is,
) -> Grouping:
    """Decides for each parameter.

    Args:
        named_parameters: as from ``model.named_parameters()``; the name may be None where it is not known.
        overrides: ``{pattern: algorithm}`` with shell-style patterns on the whole name, such as
            ``{"*.router.weight": "adamw"}``. The first match wins over the rules.
        forms: which matrices parameters are made of.
        whole_shape: of a parameter, for engines that keep it in pieces.

    Raises:
        ValueError: an override sends a parameter to Muon that is no matrix; or one is cut into matrices that do not
            add up to it.
    """
    grouping = Grouping()
    for position, (name, parameter) in enumerate(named_parameters):
        pattern = next((p for p in overrides or {} if name is not None and matches(name, p)), None)
        shown = name if name is not None else f"parameter {position}"
        shape = shape_of(shown, parameter, whole_shape)
        if overrides and pattern is not None:
            algorithm, reason = overrides[pattern], f"matches the override {pattern!r}"
        else:
            algorithm, reason = _rule(name and plain_name(name), shape)
        grouping.append(Assignment.of(shown, parameter, shape, algorithm, reason, forms))
    return grouping


def _rule(name: str | None, shape: Sequence[int]) -> tuple[Algorithm, str]:
    if len(shape) < 2:
        return "adamw", "a vector" if shape else "a scalar"
    if name is None:
        return (
            ("muon", "a matrix of unknown name") if len(shape) == 2 else ("adamw", f"{len(shape)}-D, of unknown name")
        )
    parts = name.split(".")
    ends = set(parts[-2:])  # "lm_head.weight", or a bare parameter "pos_embed"
    if ends & _EMBEDDING_MODULES or "patch_embeddings" in parts or name in _TOP_EMBEDDINGS:
        return "adamw", "an embedding, by its name"
    if ends & _HEAD_MODULES or name in _TOP_HEADS:
        return "adamw", "an output head, by its name"
    if parts[-1].endswith("bias"):
        return "adamw", "biases, by their name"
    if len(shape) == 2:
        return "muon", "a hidden matrix"
    if is_stack(name, shape):
        if is_expert(name):
            return "muon", "a stack of experts, by its name"
        return "adamw", "3-D, and not named as experts or a convolution"
    if shape[1] == 1:
        return "adamw", "a depthwise convolution: a filter of its own for each channel"
    return "muon", "a convolution"
