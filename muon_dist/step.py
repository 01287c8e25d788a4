"""One step of the optimizer: who has a gradient in it, and its way through the pipelines.

The first chunks of matrices may begin before the rest (:mod:`muon_dist.early`); a plain step begins and finishes all of
them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from muon_dist.binding import Binding
from muon_dist.connections import Connections
from muon_dist.muon import MuonMatrix
from muon_dist.pipeline import SLOTS, Run
from muon_dist.plan import Chunk
from muon_dist.shards import Shard, TensorShard
from muon_dist.statistics import Observer


class Step:
    """One update of all parameters with a gradient.

    Args:
        frees: whether gradients are dropped as soon as they have been read. Only tensors of their own can be.

    Attributes:
        binding: of the parameters that are updated.
        present: ids of the shards that have a gradient in this step, complete before it is finished.
    """

    def __init__(self, binding: Binding, connections: Connections, observer: Observer, *, frees: bool = False) -> None:
        self.binding = binding
        self.present: set[int] = set()
        self._pipelines = connections.pipelines
        self._observer = observer
        self._observation = observer.begin(binding.device)
        self._frees = frees
        self._first: Run | None = None

    def first_chunks(self) -> list[list[Shard]]:
        """What each chunk reads that can begin early: of the first set of ranks that share matrices, as many as there
        are slots. The collectives of several sets keep their order that way, and the memory its bound.

        None do in the first step: a rank must not wait for connections while others wait for its gradients.
        """
        if not self._pipelines or not self._pipelines[0][0].is_warm:
            return []
        pipeline, work = self._pipelines[0]
        return _shards_by_chunk(pipeline.plan.chunks[:SLOTS], work.matrices)

    def first_run(self, taken: Tensor | None = None) -> Run:
        """Of the first set of ranks that share matrices, for which there has to be one. Its buffers are allocated on
        the stream in use when it is first asked for."""
        if self._first is None:
            self._first = self._run(0, taken)
        return self._first

    def finish(self, taken: Tensor | None) -> None:
        """What has not begun, and all updates. Collective.

        Args:
            taken: a bool on the device, whether anything changes; None: it does.
        """

        def adamw() -> None:
            self.binding.update_adamw(taken)
            for parameter in self.binding.adamw if self._frees else ():
                _drop(parameter.shard)

        for i in range(len(self._pipelines)):
            # AdamW's update needs no exchange: it fills the time while the first chunk travels.
            run, meanwhile = (self.first_run(taken), adamw) if i == 0 else (self._run(i, taken), _nothing)
            run.finish(meanwhile)
        if not self._pipelines:
            adamw()
        self._observer.end(self._observation)

    def give_up(self) -> None:
        """Instead of finishing a step that some ranks may have begun early. Collective."""
        if self._pipelines:
            self.first_run().give_up()

    def _run(self, i: int, taken: Tensor | None) -> Run:
        pipeline, work = self._pipelines[i]
        watched = self._observation.watch(replace(work, taken=taken, present=self.present), pipeline.group)
        accumulated = _freeing(_shards_by_chunk(pipeline.plan.chunks, work.matrices)) if self._frees else _nothing
        return Run(pipeline, watched, accumulated)


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes ``device`` the current one: kernels are launched there."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _shards_by_chunk(chunks: Sequence[Chunk], matrices: Sequence[MuonMatrix]) -> list[list[Shard]]:
    """Whose gradients each chunk reads."""
    return [
        list({id(shard): shard for b in chunk.bundles for i in b.matrices for shard in (matrices[i].shard,)}.values())
        for chunk in chunks
    ]


def _freeing(chunks: Sequence[Sequence[Shard]]) -> Callable[[int], None]:
    """Drops the gradients that no chunk after one reads."""
    last = {id(shard): k for k, shards in enumerate(chunks) for shard in shards}

    def free(k: int) -> None:
        for shard in chunks[k]:
            if last[id(shard)] == k:
                _drop(shard)

    return free


def _drop(shard: Shard) -> None:
    assert isinstance(shard, TensorShard)
    shard.drop_gradient()


def _nothing(*_: object) -> None:
    pass
