"""SIGTERM: a scheduler takes the machine away. All ranks stop after the same step, save, and leave to be restarted."""

from __future__ import annotations

import signal

import torch
import torch.distributed as dist

from muon_dist.launch.environment import Environment

# sysexits.h's EX_TEMPFAIL: not done, try again. torchrun restarts on any code but 0 (--max-restarts).
EXIT_CODE = 75


class Interruption:
    """Whether any rank was asked to stop. Each step starts a small all-reduce, and the next one reads it: by then it is
    done, so no step waits for it."""

    def __init__(self, environment: Environment) -> None:
        self.device = environment.device
        self._asked = False
        self._pending: tuple[torch.Tensor, dist.Work | None] | None = None
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def is_agreed(self) -> bool:
        """The same on all ranks, which must all call it after every step."""
        previous = self._pending
        asked = torch.tensor(int(self._asked), device=self.device)
        self._pending = asked, dist.all_reduce(asked, op=dist.ReduceOp.MAX, async_op=True)
        if previous is None:
            return False
        found, work = previous
        if work is not None:
            work.wait()
        return bool(found.item())
