"""Bytes of state that other optimizers keep on each rank, for parameters that lie where DistMuon's would.

Each keeps its state as the parameters lie; replicas repeat it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from muon_dist.grouping import Assignment
from muon_dist.memory import Part, parts, state_bytes_by_rank
from muon_dist.options import Options
from muon_dist.places import Placed

Calls = Sequence[Sequence[Placed]]

# bitsandbytes 0.44 and later: two codes an element, and an fp32 scale for each block of either moment; small tensors
# stay in fp32.
_BNB_BLOCK, _BNB_SMALLEST = 256, 4096


def adamw(calls: Calls, ranks: int) -> list[int]:
    """torch.optim.AdamW: two moments in fp32."""
    every = (Placed(a.with_adamw(), place) for call in calls for a, place in call)
    return state_bytes_by_rank(every, ranks, Options())


def adamw8bit(calls: Calls, ranks: int) -> list[int]:
    """bitsandbytes' AdamW8bit."""
    found = [0] * ranks
    for part in _parts(calls):
        n = part.elements
        one = 8 * n if n < _BNB_SMALLEST else 2 * (n + 4 * math.ceil(n / _BNB_BLOCK))
        found[part.rank] += part.alike * one
    return found


def fp32_muon(calls: Calls, ranks: int) -> list[int]:
    """Muon with its momentum in fp32 where the parameter lies, AdamW for the rest: torch.optim.Muon on fp32 gradients,
    or any Muon that shards its state as FSDP does."""
    found = _others(calls, ranks)
    for part in _parts(calls):
        found[part.rank] += 4 * part.alike * part.elements * (part.algorithm == "muon")
    return found


def deepspeed_muon(calls: Calls, ranks: int, stage: int, gradient_bytes: int) -> list[int]:
    """DeepSpeed's built-in, as read and measured in 0.19.8: momentum in the gradients' dtype. At stages 1 and 2 a rank
    keeps it for the whole of every matrix that its partition touches, and a staging copy of that; at stage 0 all ranks
    keep all of it, in fp32.

    Args:
        gradient_bytes: of an element.
    """
    found = _others(calls, ranks)
    for part in _parts(calls):
        if part.algorithm == "muon":
            n = part.elements
            whole = 2 * gradient_bytes * math.prod(part.shape) if n else 0
            found[part.rank] += part.alike * {0: 4 * n, 3: gradient_bytes * n}.get(stage, whole)
    return found


def in_deepspeeds_order(assignments: Iterable[Assignment]) -> list[Assignment]:
    """As DeepSpeed's Muon puts parameters into its groups, and so ZeRO into its buffers: matrices by falling shape."""
    every = list(assignments)
    matrices = sorted((a for a in every if a.algorithm == "muon"), key=lambda a: a.shape, reverse=True)
    return [*matrices, *(a for a in every if a.algorithm == "adamw")]


def _others(calls: Calls, ranks: int) -> list[int]:
    """Of AdamW's part, in fp32."""
    others = [placed for call in calls for placed in call if placed.assignment.algorithm == "adamw"]
    return state_bytes_by_rank(others, ranks, Options())


def _parts(calls: Calls) -> Iterator[Part]:
    return parts(placed for call in calls for placed in call)
