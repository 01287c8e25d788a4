"""The AdamW part: embeddings, output heads, vectors. torch's own AdamW on this rank's shard, states through the codecs.

The update is element-wise, so shards need no exchange. Quantised states are decoded, updated and encoded a bounded
number of rows at a time. Source of 8-bit AdamW: Dettmers et al., arXiv 2110.02861; its second moment needs the
dynamic map, since a linear one rounds small values to zero and the update divides by them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from muon_dist import kernels
from muon_dist.codecs import Codec
from muon_dist.codecs.full import Full
from muon_dist.kernels import Encoded
from muon_dist.memo import Memo
from muon_dist.options import Options
from muon_dist.shards import Shard
from muon_dist.state import StoredTensor, moments_of, step_count_of

if kernels.HAS_TRITON:
    from muon_dist.kernels import adamw as adamw_kernels
    from muon_dist.kernels.adamw import AdamWBatch, Entry

# Elements decoded at a time: bounds the fp32 temporaries at three times 64 MiB for any embedding.
_SLICE_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class AdamWParameter:
    """One parameter of the AdamW part on this rank."""

    shard: Shard
    exp_avg: StoredTensor
    exp_avg_sq: StoredTensor
    step: StoredTensor  # on the device of the moments, as fused AdamW wants it

    @classmethod
    def of(cls, shard: Shard, options: Options) -> AdamWParameter:
        layout = shard.moments_layout(options.block_size)
        moments = moments_of(shard.shape, layout, options, shard.prefix)
        return cls(shard, *moments, step_count_of(layout.device, shard.prefix))

    def create_state(self) -> None:
        """Adds what is missing to the parameter's state."""
        self.step.create(self.shard.state)
        self.exp_avg.create(self.shard.state)
        self.exp_avg_sq.create(self.shard.state)

    def update(self, taken: Tensor | None, batch: AdamWBatch | None) -> None:
        """One AdamW step, where the parameter lies; nothing where there is no gradient. The step is counted before.

        Args:
            taken: a bool on the device, whether anything changes; None: it does.
            batch: may take the work, to be launched later; None if there are no kernels.
        """
        gradient = self.shard.gradient()
        weight = self.shard.weight()
        if gradient is None or weight.numel() == 0:
            return
        if kernels.usable_on(weight.device) and weight.is_contiguous() and gradient.is_contiguous():
            self._update_by_kernels(weight, gradient, taken, batch)
        else:
            self._update_by_torch(weight, gradient, taken)

    def _update_by_kernels(
        self, weight: Tensor, gradient: Tensor, taken: Tensor | None, batch: AdamWBatch | None
    ) -> None:
        group = self.shard.group
        rates = adamw_kernels.Rates.of(float(group["lr"]), group["betas"], group["eps"], group["weight_decay"])
        entry = self._entry(weight, gradient) if batch is not None else None
        if batch is None or entry is None or not batch.take(entry, weight, gradient, rates):
            step, first, second = self._for_kernels()
            counted = step if taken is None else step * taken.to(step.device)
            adamw_kernels.adamw(_as_matrix(weight), _as_matrix(gradient), counted, first, second, rates)

    def _update_by_torch(self, weight: Tensor, gradient: Tensor, taken: Tensor | None) -> None:
        group, state = self.shard.group, self.shard.state
        step = self.step.buffers(state)[""]
        first, second = self.exp_avg.buffers(state), self.exp_avg_sq.buffers(state)
        left_out = None if taken is None else (~taken.to(step.device)).float()
        for rows in _row_slices(weight):
            w = _cut(weight, rows)
            cols = w.shape[-1] if w.ndim else 1
            m = _Opened(self.exp_avg.codec, first, rows, cols)
            v = _Opened(self.exp_avg_sq.codec, second, rows, cols)
            wide = w.float().contiguous()  # w itself where it is that already
            adamw(
                [wide],
                [_cut(gradient, rows).float().contiguous()],
                [m.values],
                [v.values],
                [],
                [step - 1],  # adamw() counts it up
                fused=True,
                found_inf=left_out,  # changes nothing then, and encoding is idempotent
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=float(group["lr"]),
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            if wide is not w:
                w.copy_(wide)
            m.close()
            v.close()

    def _for_kernels(self) -> tuple[Tensor, Encoded, Encoded]:
        """Step and moments."""
        state = self.shard.state
        first, second = (moment.codec.for_kernels(moment.buffers(state)) for moment in (self.exp_avg, self.exp_avg_sq))
        return self.step.buffers(state)[""], first, second

    def _entry(self, weight: Tensor, gradient: Tensor) -> Entry | None:
        """For a launch of many, until the state lies elsewhere; None where kernels take the parameter alone."""
        stored = (self.step, self.exp_avg, self.exp_avg_sq)
        seen = (weight.device, weight.dtype, gradient.dtype, *(part.addresses(self.shard.state) for part in stored))
        return self._found.get(seen, lambda: Entry.of(_as_matrix(weight), _as_matrix(gradient), *self._for_kernels()))

    @cached_property
    def _found(self) -> Memo[Entry | None]:
        return Memo()


def update_all(parameters: Sequence[AdamWParameter], device: torch.device, taken: Tensor | None) -> None:
    """The AdamW part of a step on this rank, computed on ``device``. Ranks with an empty shard count steps like the
    others; ``taken`` is as in :meth:`AdamWParameter.update`."""
    present = [p for p in parameters if p.shard.has_gradient]
    _count([p.step.buffers(p.shard.state)[""] for p in present], taken)
    batch = AdamWBatch(taken) if kernels.usable_on(device) else None
    for p in present:
        p.update(taken, batch)
    if batch is not None:
        batch.launch()


def _count(steps: Sequence[Tensor], taken: Tensor | None) -> None:
    """Counts a step that is taken, in few launches."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for step in steps:
        by_device.setdefault(step.device, []).append(step)
    for device, here in by_device.items():
        if taken is None:
            torch._foreach_add_(here, 1)
        else:
            # Not a tensor for all of them: that would wait for the device, to read it.
            torch._foreach_add_(here, [taken.to(device, torch.float32).expand_as(step) for step in here])


class _Opened:
    """Some rows of a stored state as fp32 values that may be written: the buffer itself where it is fp32."""

    def __init__(self, codec: Codec, buffers: Mapping[str, Tensor], rows: slice | None, cols: int) -> None:
        self._codec = codec
        self._buffers = {name: _cut(buffer, rows) for name, buffer in buffers.items()}
        self._in_place = isinstance(codec, Full) and codec.dtype == torch.float32
        self.values = self._buffers[""] if self._in_place else codec.decode(self._buffers, cols)

    def close(self) -> None:
        if not self._in_place:
            self._codec.encode(self.values, self._buffers)


def _row_slices(weight: Tensor) -> Iterator[slice | None]:
    """Slices of the first dimension of at most about ``_SLICE_ELEMENTS`` elements; None for the whole."""
    if weight.ndim == 0 or weight.numel() <= _SLICE_ELEMENTS:
        yield None
        return
    height = max(1, _SLICE_ELEMENTS // math.prod(weight.shape[1:]))
    for start in range(0, weight.shape[0], height):
        yield slice(start, start + height)


def _as_matrix(tensor: Tensor) -> Tensor:
    """[rows, cols], keeping the last dimension, along which blocks lie."""
    return tensor.view(-1, tensor.shape[-1] if tensor.ndim else 1)


def _cut(tensor: Tensor, rows: slice | None) -> Tensor:
    return tensor if rows is None else tensor[rows]
