"""Where ZeRO keeps a parameter: its flat buffers, read as runs of the flattened parameters.

Each parameter group of the optimizer holds flat fp32 buffers in place of the model's parameters, one at stages 1 and 2
and one a sub-group at stage 3. What they are made of is read from the model's parameters:

- Stages 1 and 2 (and BF16_Optimizer): the parameters are views into one low-precision buffer, and rank r has
  [r n, (r + 1) n) of it. A parameter's place is its storage offset, whatever order or padding DeepSpeed chose.
  (DeepSpeed's own ``_hp_mapping`` is wrong under ``round_robin_gradients``.)
- Stage 3: rank r has [r n, (r + 1) n) of each parameter, n = ``ds_tensor.ds_numel``, and the runs of the parameters
  ``first`` to ``last`` of ``ds_id = "first_last"`` lie one behind the other.

Between steps the buffers, cast, are the parameters bit for bit. That is checked, so a layout that is not understood
stops the job instead of training garbage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from muon_dist.shards import FlatShard


class Partition(NamedTuple):
    """A shard, and the low-precision values that the model computes with."""

    shard: FlatShard
    low: Tensor  # [length]

    @property
    def problem(self) -> str | None:
        """What is wrong with it, or None."""
        stored = self.shard.weight().flatten().to(self.low.dtype).to(self.low.device)
        if torch.equal(stored, self.low):
            return None
        return f"{self.shard.name}: the optimizer's buffer at {self.shard.offset} does not hold this parameter"


class Buffer(NamedTuple):
    """One flat buffer of a parameter group."""

    flat: Tensor
    group: dict[str, Any]
    state: dict[str, Any]
    device: torch.device  # where it is computed


def stage_of(parameters: Iterable[Tensor]) -> int:
    """The ZeRO stage that has laid out a model's parameters: 0, 2 (or 1), 3."""
    first = next(iter(parameters), None)
    if hasattr(first, "ds_id"):
        return 3
    return 2 if getattr(first, "_dp_group", None) is not None else 0


def partitions(parameters: Mapping[str, Tensor], buffer: Buffer) -> Iterator[Partition]:
    """The parameters that ``buffer`` is made of.

    Args:
        parameters: the trainable ones of the group, by name, in order.
    """
    if stage_of(parameters.values()) == 3:
        yield from _of_stage_3(parameters, buffer)
    else:
        yield from _of_stages_1_and_2(parameters, buffer)


def _of_stages_1_and_2(parameters: Mapping[str, Tensor], buffer: Buffer) -> Iterator[Partition]:
    length = buffer.flat.numel()
    for name, p in parameters.items():
        process_group: Any = p._dp_group  # type: ignore[attr-defined]
        ranks, index = _members(process_group)
        start = int(p.storage_offset())
        stop = start + p.numel()
        runs = [(0, 0)] * len(ranks)
        for rank in range(start // length, min((stop - 1) // length + 1, len(ranks))):
            first, last = max(start, rank * length), min(stop, (rank + 1) * length)
            runs[rank] = (first - start, last - first)
        begin, count = runs[index]
        offset = start + begin - index * length if count else 0
        shard = _shard(name, tuple(p.shape), buffer, offset, runs, ranks, index)
        yield Partition(shard, p.detach().flatten()[begin : begin + count])


def _of_stage_3(parameters: Mapping[str, Tensor], buffer: Buffer) -> Iterator[Partition]:
    names: list[str] = list(parameters)
    ids: list[int] = [p.ds_id for p in parameters.values()]  # type: ignore[attr-defined]
    first, last = (ids.index(int(end)) for end in buffer.flat.ds_id.split("_"))  # type: ignore[attr-defined]
    offset = 0
    for name in names[first : last + 1]:
        p: Any = parameters[name]
        ranks, index = _members(p.ds_process_group)
        length = p.ds_tensor.ds_numel  # of every rank; what lies past the parameter's end is padding
        runs = equal_runs(p.ds_numel, length, len(ranks))
        shard = _shard(name, tuple(p.ds_shape), buffer, offset, runs, ranks, index)
        yield Partition(shard, p.ds_tensor.detach().flatten()[: runs[index][1]])
        offset += length
    if offset != buffer.flat.numel():
        raise ValueError(
            f"ZeRO-3's buffer of {names[first]} to {names[last]} has {buffer.flat.numel()} elements, its parameters' "
            f"parts add up to {offset}: this layout of DeepSpeed's is not understood"
        )


@lru_cache(maxsize=4096)
def equal_runs(numel: int, length: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """Runs of ``length`` elements, the last ones short or empty; cached, since layers repeat."""
    return tuple((rank * length, min(max(numel - rank * length, 0), length)) for rank in range(ranks))


def _shard(
    name: str,
    shape: tuple[int, ...],
    buffer: Buffer,
    offset: int,
    runs: Sequence[tuple[int, int]],
    ranks: tuple[int, ...],
    index: int,
) -> FlatShard:
    return FlatShard(
        name=name,
        shape=shape,
        group=buffer.group,
        state=buffer.state,
        prefix=f"{name}.",
        ranks=ranks,
        device=buffer.device,
        flat=buffer.flat,
        offset=offset,
        runs=tuple(runs),
        index=index,
    )


def _members(process_group: dist.ProcessGroup) -> tuple[tuple[int, ...], int]:
    """Global ranks of a group in its own order, which is ascending in DeepSpeed, and this rank's place among them."""
    return tuple(dist.get_process_group_ranks(process_group)), dist.get_rank(process_group)
