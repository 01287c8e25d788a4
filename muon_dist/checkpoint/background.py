"""Writing while training goes on: a copy of the state in host memory, a thread, and a process group of its own.

The threads of the ranks talk over gloo, in a group that nothing else uses, so their collectives never meet those of
training. What they write and how it is sealed is what a save that waits does.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import BlockingAsyncStager


class Background:
    """A thread that runs one job at a time. Its construction is collective.

    Args:
        group: the ranks that write together; None for a single process.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group: dist.ProcessGroup | None = None
        if group is not None:
            ranks = dist.get_process_group_ranks(group)
            self._group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        self._thread = ThreadPoolExecutor(1, "muon_dist.checkpoint")
        self._last: Future[None] | None = None

    def start(self, job: Callable[[dist.ProcessGroup | None], None]) -> Future[None]:
        """Runs ``job``, given the thread's group, when the one before is done. Raises what that one raised."""
        self.wait()
        self._last = self._thread.submit(job, self._group)
        return self._last

    def wait(self) -> None:
        """Waits for the last job, and raises what it raised, once."""
        last, self._last = self._last, None
        if last is not None:
            last.result()


def on_host(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of a nest of dictionaries, lists, tensors and DTensors; pinned where there is an accelerator. Complete
    when it returns."""
    staged: dict[str, Any] = BlockingAsyncStager(cache_staged_state_dict=torch.accelerator.is_available()).stage(state)
    return staged
