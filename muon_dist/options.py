"""The options that hold for the whole optimizer, checked when they are given; and the names that options take."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal, get_args, get_origin, get_type_hints

import torch

from muon_dist.forms import Forms

Algorithm = Literal["muon", "adamw"]
RowWiseState = Literal["fp32", "bf16", "linear8", "dynamic8", "int4", "nf4"]
LowRankState = Literal["grasp4", "lowrank4"]
MomentumState = Literal[RowWiseState, LowRankState]
AdamWState = Literal["fp32", "dynamic8"]
Polar = Literal["doubling", "polar_express", "jordan", "cans", "jiacheng"]
PolarForm = Literal["auto", "standard", "gram"]
UpdateScale = Literal["match_rms_adamw", "spectral", "none"]
Wire = Literal["fp32", "bf16", "int8", "nf4"]
Nonfinite = Literal["propagate", "skip", "raise"]

# A block of 128 with a bf16 scale costs 1.016 bytes an element. benchmarks/README.md has the measurements behind it.
DEFAULT_BLOCK_SIZE = 128
DEFAULT_CHUNK_BYTES = 128 << 20


@dataclass(frozen=True)
class Options:
    """What cannot differ between parameter groups; :class:`muon_dist.optimizer.DistMuon` explains each.

    Raises:
        ValueError: an option has a value that it cannot take; the message names the ones it can.
    """

    momentum_state: MomentumState = "linear8"
    block_size: int = DEFAULT_BLOCK_SIZE
    rank_fraction: float | None = None
    polar: Polar = "doubling"
    polar_steps: int | None = None
    polar_form: PolarForm = "auto"
    polar_dtype: torch.dtype | None = None
    wire: Wire = "bf16"
    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    offload_momentum: bool = False
    adamw_state: AdamWState = "fp32"
    nonfinite: Nonfinite = "propagate"
    forms: Forms = field(default_factory=Forms)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if value is None and type(None) in get_args(hints[name]):
                continue
            if get_origin(hints[name]) is Literal:
                require_one_of(name, value, get_args(hints[name]))
            elif hints[name] in (int, int | None) and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r}: it must be a positive integer")
            elif hints[name] is bool and not isinstance(value, bool):
                raise ValueError(f"{name}={value!r}: it must be True or False")
        if self.polar == "doubling" and self.polar_form != "auto":
            raise ValueError(
                f"polar_form={self.polar_form!r}: 'doubling' has one form; leave it out, or choose "
                f"polar='polar_express'"
            )
        if self.polar == "doubling" and self.polar_dtype is torch.bfloat16:
            raise ValueError(
                "polar_dtype=torch.bfloat16: 'doubling' needs the digits of torch.float16; choose that, or "
                "polar='polar_express'"
            )
        if self.rank_fraction is not None and not 0 < self.rank_fraction <= 1:
            raise ValueError(f"rank_fraction={self.rank_fraction!r}: it must be above 0 and at most 1, or None")
        if self.polar_dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"polar_dtype={self.polar_dtype}: it must be torch.float32, bfloat16 or float16")


def require_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless ``value`` is one of the names that the option ``name`` can take."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: it must be one of {', '.join(map(repr, allowed))}")
