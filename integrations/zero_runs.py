"""Where ZeRO is going to keep parameters, told from their sizes alone, for forecasts.

:mod:`muon_dist.integrations.zero` reads the same from a model that DeepSpeed has laid out; a test holds the two
together. DeepSpeed itself is not needed here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from muon_dist.grouping import Assignment
from muon_dist.integrations.zero import equal_runs
from muon_dist.places import InRuns, Placed, row_shards

# DeepSpeed's own: each rank's part of a flat buffer is a multiple of this (stages 1 and 2), and a sub-group closes when
# a rank has this many elements of it (stage 3, "sub_group_size").
_ALIGNMENT = 2
_SUB_GROUP_ELEMENTS = 10**9


def calls_of_stage(groups: Iterable[Sequence[Assignment]], stage: int, ranks: int) -> list[list[Placed]]:
    """All parameters with their places, by the call of ``step()`` in which ZeRO has them updated.

    Args:
        groups: the parameter groups of the optimizer, each of which ZeRO keeps in buffers of its own.
        stage: 0 to 3.
    """
    if stage == 0:
        place = row_shards(1, ranks, shares_momentum=False)
        return [[Placed(assignment, place) for group in groups for assignment in group]]
    if stage == 3:
        return [call for group in groups for call in _sub_groups(group, ranks)]
    return [_flat_buffer(group, ranks) for group in groups]


def _flat_buffer(group: Sequence[Assignment], ranks: int) -> list[Placed]:
    """Stages 1 and 2: rank r has [r n, (r + 1) n) of all parameters laid end to end."""
    sizes = [math.prod(assignment.shape) for assignment in group]
    length = _ALIGNMENT * math.ceil(sum(sizes) / (_ALIGNMENT * ranks))
    placed = []
    start = 0
    for assignment, size in zip(group, sizes, strict=True):
        runs = [(0, 0)] * ranks
        for rank in range(start // length, (start + size - 1) // length + 1):
            first, last = max(start, rank * length), min(start + size, (rank + 1) * length)
            runs[rank] = (first - start, last - first)
        placed.append(Placed(assignment, InRuns(tuple(runs))))
        start += size
    return placed


def _sub_groups(group: Sequence[Assignment], ranks: int) -> list[list[Placed]]:
    """Stage 3: every parameter is cut into as many runs as there are ranks."""
    calls: list[list[Placed]] = [[]]
    filled = 0
    for assignment in group:
        if filled >= _SUB_GROUP_ELEMENTS:
            calls.append([])
            filled = 0
        size = math.prod(assignment.shape)
        length = math.ceil(size / ranks)
        calls[-1].append(Placed(assignment, InRuns(equal_runs(size, length, ranks))))
        filled += length
    return calls
