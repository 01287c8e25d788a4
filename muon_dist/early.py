"""A step that begins during the backward pass before it.

Hooks on the parameters tell when gradients are there. The first chunks of matrices, as many as there are slots of
buffers, are accumulated and sent as soon as all of their gradients are; ``step()`` sends the others and does the rest.
Chunks go out in the order of the plan, whatever order gradients come in, and a chunk whose gradients come late or not
at all on a rank is sent by its ``step()``: so all ranks issue the same collectives in the same order.

A pass that raised is given up, when the optimizer is used next: ranks that had come to different chunks then send as
many as there are slots for, which nobody reads. (Not at once: a rank that fails alone should fail, not wait.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from muon_dist.binding import Binding
from muon_dist.options import Options
from muon_dist.pipeline import Run
from muon_dist.sharding import is_settled
from muon_dist.shards import TensorShard
from muon_dist.step import Step, current_device

_SAMPLED = 32  # elements of a gradient that are compared


class _Phase(Enum):
    IDLE = auto()
    IN_BACKWARD = auto()
    BEGUN = auto()  # step() has to follow
    FAILED = auto()  # to be given up


def require_possible(binding: Binding, options: Options) -> None:
    """Raises ValueError where gradients of matrices are not final, or cannot be read, during the backward pass."""
    if options.nonfinite != "propagate":
        raise ValueError(
            f"nonfinite={options.nonfinite!r} judges all gradients before any is used, and during_backward() uses the "
            f'first before the last is there; leave it out, or make the optimizer with nonfinite="propagate"'
        )
    for parameter in binding.muon:
        shard = parameter.shard
        if not isinstance(shard, TensorShard):
            raise ValueError(
                f"{shard.name} lies in a flat buffer, whose gradients the engine hands over after the backward pass; "
                f"leave during_backward() out"
            )
        if len(shard.ranks) > 1 and not isinstance(shard.parameter, DTensor):
            raise ValueError(
                f"{shard.name} is a plain tensor on {len(shard.ranks)} ranks: during the backward pass its gradient is "
                f"this rank's own, which DistributedDataParallel averages later; leave during_backward() out, or shard "
                f"the model with fully_shard"
            )
        if shard.weight().device != shard.device:
            raise ValueError(
                f"{shard.name} is offloaded: its gradient is copied to the host during the backward pass; leave "
                f"during_backward() out"
            )


class Early:
    """What of an optimizer's next step has begun."""

    def __init__(self) -> None:
        self._phase = _Phase.IDLE
        self._beginning: _Beginning | None = None
        self._check: _Check | None = None  # of the last step's gradients

    @contextmanager
    def during_backward(self, step: Step) -> Iterator[None]:
        """Around the backward pass before ``step``.

        Raises:
            RuntimeError: the step before was not finished, or read other gradients than it should have.
        """
        self._require_unchanged()
        if self._phase is _Phase.IN_BACKWARD:
            raise RuntimeError("during_backward() inside of during_backward(): only the backward pass belongs there")
        if self._phase is _Phase.BEGUN:
            self._give_up()
            raise RuntimeError(
                "step() was not called after the last during_backward(); what had begun was given up, and the momentum "
                "has these gradients. Enter it for the last backward pass of a step only, and only if step() follows"
            )
        if self._phase is _Phase.FAILED:
            self._give_up()
        self._beginning, self._phase = _Beginning(step), _Phase.IN_BACKWARD
        hooks = self._beginning.listen()
        try:
            yield
            self._phase = _Phase.BEGUN
        finally:
            for hook in hooks:
                hook.remove()
            if self._phase is _Phase.BEGUN:
                self._beginning.remember()
            else:
                self._phase = _Phase.FAILED
            self._beginning.join()

    def require_finished(self, what: str) -> None:
        """Raises RuntimeError if ``what`` would find a step halfway."""
        if self._phase in (_Phase.IN_BACKWARD, _Phase.BEGUN):
            raise RuntimeError(
                f"{what} between during_backward() and step() would find the state halfway; call step() first"
            )

    def take(self, binding: Binding) -> Step | None:
        """The step that has begun, for ``step()`` to finish and then to say so; None if none has.

        Raises:
            RuntimeError: it read other gradients than it should have; it is given up.
        """
        self._require_unchanged()
        if self._phase is _Phase.IN_BACKWARD:
            raise RuntimeError("step() inside of during_backward(): only the backward pass belongs there")
        if self._phase is _Phase.FAILED:
            self._give_up()
        if self._beginning is None:
            return None
        self._phase = _Phase.FAILED  # until it is finished
        if self._beginning.step.binding is not binding:
            raise RuntimeError(
                "parameters were swapped, cast, frozen or added between during_backward() and step(); "
                "change them after step()"
            )
        self._beginning.compare()
        return self._beginning.step

    def finished(self) -> None:
        """The step that was taken is done."""
        if self._beginning is not None:
            self._check, self._beginning, self._phase = self._beginning.check, None, _Phase.IDLE

    def _give_up(self) -> None:
        beginning, self._beginning, self._phase = self._beginning, None, _Phase.IDLE
        if beginning is not None:
            beginning.step.give_up()

    def _require_unchanged(self) -> None:
        check, self._check = self._check, None
        if check is not None:
            check.require_unchanged()


class _Beginning:
    """The beginning of one step: which gradients are there, and which have been read."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.check: _Check | None = None
        self._device = step.binding.device
        self._streams = torch.get_device_module(self._device)
        self._origin = self._streams.current_stream(self._device)
        self._chunks = [[s for s in chunk if isinstance(s, TensorShard)] for chunk in step.first_chunks()]
        self._missing = [{id(shard) for shard in chunk} for chunk in self._chunks]
        self._made_on: set[Any] = set()  # streams, of gradients
        self._run: Run | None = None
        self._read: dict[int, tuple[TensorShard, Tensor | None]] = {}  # by the shard's id; None: dropped since

    def listen(self) -> list[Any]:
        """Handles of hooks on all parameters that can begin early."""
        shards = {id(shard): shard for chunk in self._chunks for shard in chunk}
        return [
            shard.parameter.register_post_accumulate_grad_hook(partial(self._arrived, shard))
            for shard in shards.values()
        ]

    @torch.no_grad()
    def _arrived(self, shard: TensorShard, parameter: Tensor) -> None:
        """Begins the chunks that have all gradients now. Called on the stream that ``parameter.grad`` is made on."""
        if id(shard) in self._read:
            raise RuntimeError(
                f"the gradient of {shard.name} came in parts, and the first was read already: there are two backward "
                f"passes in during_backward(), or what is used twice is recomputed (checkpoint with "
                f"use_reentrant=True). Make one pass of it, or leave during_backward() out"
            )
        if not is_settled(parameter):
            return  # step() adds up partial sums, and refuses what cannot be read
        self._made_on.add(self._streams.current_stream(self._device))
        for missing in self._missing:
            missing.discard(id(shard))
        # The pass may run on a thread with another device, or under autocast.
        with current_device(self._device), torch.autocast(self._device.type, enabled=False):
            while (k := self._begun) < len(self._chunks) and not self._missing[k]:
                self._begin(self._chunks[k])

    @property
    def _begun(self) -> int:
        return 0 if self._run is None else self._run.begun

    def _begin(self, chunk: Sequence[TensorShard]) -> None:
        if self._run is None:
            with self._streams.stream(self._origin):
                self._run = self.step.first_run()
            self._run.follow(self._origin)
        for stream in self._made_on:
            self._run.follow(stream)
        self.step.present.update(id(shard) for shard in chunk)
        self._run.begin()
        self._read.update((id(shard), (shard, shard.parameter.grad)) for shard in chunk)

    def remember(self) -> None:
        """Which gradients have been read and are still there."""
        kept = [shard for shard, gradient in self._read.values() if gradient is not None and shard.weight().numel()]
        if self._run is not None and kept:
            self.check = _Check(kept, self._run.side, self._device)

    def join(self) -> None:
        """Lets the stream in use change and free gradients."""
        if self._run is not None:
            self._run.join()

    def compare(self) -> None:
        """Raises RuntimeError if gradients are gone or others; has the device compare the values of the rest."""
        replaced = [shard.name for shard, gradient in self._read.values() if shard.parameter.grad is not gradient]
        if replaced:
            raise RuntimeError(_changed(replaced))
        if self.check is not None:
            self.check.compare()


class _Check:
    """Whether gradients were changed after they had been read, told by a few elements of each. It waits for nothing:
    the next step asks, on the stream that did the work of this one. (Versions of tensors do not tell: torch's _foreach
    functions, with which it clips, leave those of DTensors as they are.)"""

    def __init__(self, shards: Sequence[TensorShard], side: Any, device: torch.device) -> None:
        self._shards = shards
        self._side = side
        self._device = device
        self._streams = torch.get_device_module(device)
        self._differs = torch.empty(0, dtype=torch.bool)
        with self._streams.stream(side):
            self._before = self._elements()

    def compare(self) -> None:
        """With the gradients as the stream in use leaves them."""
        self._side.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._side):
            self._differs = self._elements() != self._before

    def require_unchanged(self) -> None:
        """Raises RuntimeError naming the parameters whose gradients were changed."""
        with self._streams.stream(self._side):
            differs = self._differs.tolist()
        if any(differs):
            owners = [shard.name for shard in self._shards for _ in range(_sampled(shard.weight()).numel())]
            raise RuntimeError(_changed(dict.fromkeys(n for n, d in zip(owners, differs, strict=True) if d)))

    @torch.no_grad()
    def _elements(self) -> Tensor:
        """As bits, by which NaN equals itself."""
        sampled = [_sampled(gradient) for shard in self._shards if (gradient := shard.gradient()) is not None]
        return torch.cat(sampled).float().view(torch.int32)


def _sampled(gradient: Tensor) -> Tensor:
    """A few elements of the first row, in place."""
    return gradient[(0,) * (gradient.ndim - 1)][:_SAMPLED]


def _changed(names: Iterable[str]) -> str:
    return (
        f"the gradients of {', '.join(names)} were changed after during_backward() had read them. Clip, scale and "
        f"accumulate gradients without it, or leave them as they are until step() is done"
    )
