"""The overlapped loop over chunks: while one is orthogonalised, the next and the last one travel.

    side stream     accumulate 1 | gather 1 ~~> ............... apply 0 | accumulate 2 | gather 2 ~~> ...
    current stream  ........ polar 0 ........| scatter 0 ~~> ........ polar 1 ........ | scatter 1 ~~> ...

Two slots of buffers, used in turn, bound the memory for any number of chunks; they live for one step only, so that
the forward and backward passes can use the memory. Collectives go out asynchronously in the same order on all ranks,
each ordered behind the stream that packed its buffer. Nothing here waits on the host, except with gloo on CPU, where
waiting for a collective is waiting on the host: there the way to the owners is hidden and the way back is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from muon_dist.exchange import Buffers, Exchange, PackedPiece, new_buffers
from muon_dist.plan import Plan
from muon_dist.wire import WireFormat

SLOTS = 2  # of buffers, used in turn


class _Waitable(Protocol):
    """A collective or an event: the stream in use waits for it."""

    def wait(self) -> object: ...


class MatrixWork(Protocol):
    """What is done to matrices; the loop says when. Matrices are known by their positions in the plan."""

    def accumulate(self, pieces: Sequence[PackedPiece]) -> None:
        """Takes this rank's gradients into its momentum and packs what is to be orthogonalised."""

    def polar(self, matrices: Tensor, out: Tensor | None) -> Tensor:
        """Polar factors of ``[n, rows, cols]``; in ``out``, which may be the same memory, or in new memory."""

    def apply(self, pieces: Sequence[PackedPiece]) -> None:
        """Updates pieces of this rank's parameters from their packed updates."""


class Pipeline:
    """Runs one plan, of one matrix at least, step after step."""

    def __init__(self, plan: Plan, wire: WireFormat, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.plan = plan
        self.group = group
        self._device = device
        self._exchanges = [Exchange(chunk, wire, group) for chunk in plan.chunks]
        self._streams = torch.get_device_module(device)
        self._side = self._streams.Stream() if device.type == "cpu" else self._streams.Stream(device=device)

    def run(self, work: MatrixWork, meanwhile: Callable[[], None]) -> None:
        """One step of all matrices. ``meanwhile`` runs while the first chunk is on its way."""
        current = self._streams.current_stream(self._device)
        slots = [new_buffers(self._exchanges, self.group, self._device) for _ in self._exchanges[:SLOTS]]
        self._side.wait_stream(current)
        arriving = self._gather(0, work, slots)
        meanwhile()
        for k, exchange in enumerate(self._exchanges):
            arrived = arriving
            if k + 1 < len(self._exchanges):
                arriving = self._gather(k + 1, work, slots)
            buffers = slots[k % SLOTS]
            arrived.wait()
            with record_function("muon_dist.polar"):
                exchange.replace_owned(work.polar, buffers)
            with record_function("muon_dist.scatter"):
                returned = self._departed(exchange.scatter(buffers))
            with self._streams.stream(self._side), record_function("muon_dist.apply"):
                returned.wait()
                exchange.apply_updates(work.apply, buffers)
        current.wait_stream(self._side)

    def _gather(self, k: int, work: MatrixWork, slots: list[Buffers]) -> _Waitable:
        """Accumulates and sends off chunk ``k``, on the side stream, behind the apply that last used its slot."""
        buffers = slots[k % SLOTS]
        with self._streams.stream(self._side):
            with record_function("muon_dist.accumulate"):
                self._exchanges[k].pack_held(work.accumulate, buffers)
            with record_function("muon_dist.gather"):
                return self._departed(self._exchanges[k].gather(buffers))

    def _departed(self, collective: dist.Work | None) -> _Waitable:
        """What to wait for: the collective, or what the stream in use has done so far where nothing travels."""
        if collective is not None:
            return collective
        event = self._streams.Event()
        event.record(self._streams.current_stream(self._device))
        return cast(_Waitable, event)
