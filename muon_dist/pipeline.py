"""The overlapped loop over chunks: while one is orthogonalised, the next and the last one travel.

    side stream     accumulate 1 | gather 1 ~~> ............... apply 0 | accumulate 2 | gather 2 ~~> ...
    current stream  ........ polar 0 ........| scatter 0 ~~> ........ polar 1 ........ | scatter 1 ~~> ...

Two slots of buffers, used in turn, bound the memory for any number of chunks; they live for one step only, so that
the forward and backward passes can use the memory. Collectives go out asynchronously in the same order on all ranks,
each ordered behind the stream that packed its buffer. Nothing here waits on the host, except with gloo on CPU, where
waiting for a collective is waiting on the host: there the way to the owners is hidden and the way back is not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from muon_dist.exchange import Exchange, PackedPiece, new_buffers
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
    """What the steps of one plan, of one matrix at least, have in common.

    Attributes:
        side: the side stream.
        is_warm: whether a step has been finished. Until then NCCL has connections to make, for which it waits on the
            host.
    """

    def __init__(self, plan: Plan, wire: WireFormat, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.plan = plan
        self.group = group
        self.device = device
        self.exchanges = [Exchange(chunk, wire, group) for chunk in plan.chunks]
        streams = torch.get_device_module(device)
        self.is_warm = False
        self.side = streams.Stream() if device.type == "cpu" else streams.Stream(device=device)


class Run:
    """One step of a pipeline: chunks begin in the order of the plan, some of them perhaps early, and all are finished.

    Its buffers are allocated on the stream in use.

    Args:
        work: what is done to the matrices.
        accumulated: called with the position of each chunk on the side stream, behind what reads its gradients.

    Attributes:
        begun: how many chunks have been accumulated and sent.
        side: the side stream.
    """

    def __init__(self, pipeline: Pipeline, work: MatrixWork, accumulated: Callable[[int], None]) -> None:
        self.begun = 0
        self.side = pipeline.side
        self._pipeline = pipeline
        self._exchanges = pipeline.exchanges
        self._device = pipeline.device
        self._streams = torch.get_device_module(pipeline.device)
        self._work = work
        self._accumulated = accumulated
        self._slots = [new_buffers(self._exchanges, pipeline.group, self._device) for _ in self._exchanges[:SLOTS]]
        self._arriving: deque[_Waitable] = deque()  # chunks on their way to their owners

    def follow(self, stream: Any) -> None:
        """Orders the side stream behind what ``stream`` has done so far, such as allocating or making gradients."""
        self.side.wait_stream(stream)

    def begin(self) -> None:
        """Accumulates and sends off the next chunk, behind the apply that last used its slot."""
        with self._streams.stream(self.side):
            with record_function("muon_dist.accumulate"):
                self._exchanges[self.begun].pack_held(self._work.accumulate, self._slots[self.begun % SLOTS])
                self._accumulated(self.begun)
            self._send()

    def finish(self, meanwhile: Callable[[], None]) -> None:
        """All that is left. ``meanwhile`` runs while the first chunk is on its way; or behind its polar factors where
        nothing travels, so that a device that had nothing to do is at work while the host prepares it."""
        self.follow(self._streams.current_stream(self._device))
        if not self.begun:
            self.begin()
        travels = self._pipeline.group is not None
        if travels:
            meanwhile()
        for k, exchange in enumerate(self._exchanges):
            if self.begun < min(k + SLOTS, len(self._exchanges)):
                self.begin()
            buffers = self._slots[k % SLOTS]
            self._arriving.popleft().wait()
            with record_function("muon_dist.polar"):
                exchange.replace_owned(self._work.polar, buffers)
            if k == 0 and not travels:
                meanwhile()
            with record_function("muon_dist.scatter"):
                returned = self._departed(exchange.scatter(buffers))
            with self._streams.stream(self.side), record_function("muon_dist.apply"):
                returned.wait()
                exchange.apply_updates(self._work.apply, buffers)
        self.join()
        self._pipeline.is_warm = True

    def give_up(self) -> None:
        """Instead of finishing: ranks may have begun different chunks, so all send as many as there are slots for, with
        whatever is in the buffers, and nobody reads them."""
        with self._streams.stream(self.side):
            while self.begun < len(self._slots):
                self._send()
            while self._arriving:
                self._arriving.popleft().wait()
        self.join()

    def join(self) -> None:
        """Orders the stream in use behind the side stream."""
        self._streams.current_stream(self._device).wait_stream(self.side)

    def _send(self) -> None:
        """Starts the next chunk's way to its owners, behind the side stream."""
        with record_function("muon_dist.gather"):
            collective = self._exchanges[self.begun].gather(self._slots[self.begun % SLOTS])
            self._arriving.append(self._departed(collective))
        self.begun += 1

    def _departed(self, collective: dist.Work | None) -> _Waitable:
        """What to wait for: the collective, or what the stream in use has done so far where nothing travels."""
        if collective is not None:
            return collective
        event = self._streams.Event()
        event.record(self._streams.current_stream(self._device))
        return cast(_Waitable, event)
