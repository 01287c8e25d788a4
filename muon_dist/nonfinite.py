"""What NaN and infinite gradients do to a step: the same on all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from muon_dist.agreement import gathered
from muon_dist.binding import Binding
from muon_dist.connections import ProcessGroups
from muon_dist.options import Nonfinite


class Judge:
    """Says of every step whether it is taken.

    Args:
        nonfinite: the option.
    """

    def __init__(self, nonfinite: Nonfinite) -> None:
        self._nonfinite = nonfinite
        self._skipped: Tensor | None = None  # a count on the device

    @property
    def skipped(self) -> int:
        """Steps that were not taken. Waits for the device."""
        return 0 if self._skipped is None else int(self._skipped)

    def taken(self, binding: Binding, process_groups: ProcessGroups) -> Tensor | None:
        """Whether this step is taken: a bool on the device, the same on all ranks, for which the host does not wait; or
        None: it is. Collective, unless the option is "propagate".

        Raises:
            FloatingPointError: gradients are not finite, and the option says so; this waits.
        """
        if self._nonfinite == "propagate":
            return None
        gradients = [
            (shard.name, gradient)
            for shard in binding.shards
            if (gradient := shard.gradient()) is not None and gradient.numel()
        ]
        groups = [group for ranks in binding.domains() if (group := process_groups.of(ranks))]
        taken = all_finite([gradient for _, gradient in gradients], groups, binding.device)
        if self._nonfinite == "skip":
            self._skipped = ~taken + (0 if self._skipped is None else self._skipped)
            return taken
        if not taken:
            raise FloatingPointError(
                f"the gradients of {', '.join(nonfinite_names(gradients, groups))} hold NaN or infinity; nothing was "
                f'updated. Lower the learning rate, clip the gradients, skip such steps with nonfinite="skip", or let '
                f'them pass with "propagate"'
            )
        return None


def all_finite(gradients: Sequence[Tensor], groups: Sequence[dist.ProcessGroup], device: torch.device) -> Tensor:
    """Whether the gradients of all ranks are finite: a bool scalar on ``device``, the same on every rank.

    Costs one pass over the gradients and a small all-reduce a group. The host waits for nothing, except with gloo.
    """
    largest = get_total_norm(gradients, norm_type=math.inf)  # of NaN it is NaN
    finite = torch.isfinite(largest).to(device=device, dtype=torch.int32)
    for group in groups:
        dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=group)
    return finite.bool()


def nonfinite_names(gradients: Sequence[tuple[str, Tensor]], groups: Sequence[dist.ProcessGroup]) -> list[str]:
    """Whose gradients hold a NaN or an infinity on any rank: the same names on all of them. Waits for the device."""
    names = {name for name, gradient in gradients if not torch.isfinite(gradient).all()}
    for group in groups:
        names = names.union(*gathered(names, group))
    return sorted(names)
