"""What the ranks of a job must agree on, checked where it can be.

- Before the first step, and when parameters change: a plan is computed by every rank on its own. If the inputs differ
  the collectives differ and the job hangs; so their fingerprints are compared first.
- At every step: which gradients are missing, where there are replicas to drift apart; and whether all are finite, where
  the options ask for it (:mod:`muon_dist.nonfinite`).

On a difference every rank raises, naming it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_SHOWN = 5
T = TypeVar("T")


def gathered(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """What every rank of ``group`` gives, in its order; without a group what this process gives."""
    if group is None:
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def require_same(lines: Sequence[str], group: dist.ProcessGroup) -> None:
    """Raises ValueError on every rank of ``group`` unless all give the same lines."""
    if len(set(gathered(hashlib.sha256("\n".join(lines).encode()).hexdigest(), group))) == 1:
        return
    everyones = gathered(list(lines), group)
    ranks = dist.get_process_group_ranks(group)
    for rank, theirs in zip(ranks, everyones, strict=True):
        differences = _differences(everyones[0], theirs)
        if differences:
            raise ValueError(
                f"ranks {ranks[0]} and {rank} were given different optimizers; give every rank the same parameters in "
                f"the same order with the same options:\n" + "\n".join(differences)
            )


def require_none(problems: Sequence[str], group: dist.ProcessGroup | None, heading: str) -> None:
    """Raises ValueError on every rank of ``group`` if any of them has a problem."""
    found = gathered(list(problems), group)
    lines = [f"  rank {rank}: {problem}" for rank, theirs in enumerate(found) for problem in theirs[:_SHOWN]]
    if lines:
        raise ValueError(f"{heading}:\n" + "\n".join(lines))


class Watch:
    """Compares what ranks say at every step, and waits for no answer: a step starts a small all-reduce, and the next
    one reads it, on a stream of its own."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._streams = torch.get_device_module(device)
        self._side = self._streams.Stream() if device.type == "cpu" else self._streams.Stream(device=device)
        self._pending: tuple[frozenset[str], Tensor, dist.Work] | None = None

    def require_same(self, names: frozenset[str], what: str) -> None:
        """Raises ValueError on every rank if the last step's names were not the same on all of them.

        Args:
            what: ``names`` are, for the message.
        """
        if self._pending is not None:
            last, extremes, work = self._pending
            self._pending = None
            with self._streams.stream(self._side):
                work.wait()
                largest, negated_smallest = extremes.tolist()
            if largest != -negated_smallest:
                self._raise(last, what)
        fingerprint = int.from_bytes(hashlib.sha256("\n".join(sorted(names)).encode()).digest()[:7], "big")
        with self._streams.stream(self._side):
            extremes = torch.tensor([fingerprint, -fingerprint], device=self._device)
            started: Any = dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = names, extremes, started

    def _raise(self, names: frozenset[str], what: str) -> None:
        everyones = gathered(names, self._group)
        differing = set().union(*everyones) - everyones[0].intersection(*everyones)
        lines = [
            f"  {name}: on ranks {[rank for rank, theirs in enumerate(everyones) if name in theirs]}"
            for name in sorted(differing)[:_SHOWN]
        ]
        raise ValueError(f"{what}:\n" + "\n".join(lines))


def _differences(ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    found = [f"  {a!r} != {b!r}" for a, b in zip(ours, theirs, strict=False) if a != b]
    if len(ours) != len(theirs):
        found.append(f"  {len(ours)} entries != {len(theirs)} entries")
    return found[:_SHOWN]
