"""The optimizer as a text to read: groups, state by codec, where matrices lie, and who orthogonalises them when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch.distributed as dist

from muon_dist.binding import Binding, ParamGroups
from muon_dist.layout import Geometry, held_by
from muon_dist.loads import PolarMemory, loads_of
from muon_dist.options import Options
from muon_dist.plan import Plan
from muon_dist.polar import schedule
from muon_dist.wire import wire_format

_OPTIONS = {
    "muon": ("lr", "weight_decay", "momentum", "nesterov", "update_scale"),
    "adamw": ("lr", "weight_decay", "betas", "eps"),
}


def describe(
    groups: ParamGroups, binding: Binding, options: Options, domains: Sequence[tuple[tuple[int, ...], Plan]]
) -> str:
    """Sections of indented lines.

    Args:
        domains: the ranks of every set that exchanges matrices, and their plan.
    """
    lines = ["groups", *_groups(groups, binding), "state on this rank", *_state(binding)]
    for ranks, plan in domains:
        index = ranks.index(dist.get_rank()) if len(ranks) > 1 else 0
        lines += [f"matrices of {_shown(ranks)}", *_layouts(plan, index), "plan", *_plan(plan, index, binding, options)]
    return "\n".join(lines)


def _groups(groups: ParamGroups, binding: Binding) -> Iterator[str]:
    for group in groups:
        shards = [shard for shard in binding.shards if shard.group is group]
        values = ", ".join(f"{key} {group[key]}" for key in _OPTIONS[group["algorithm"]])
        frozen = len(group["params"]) - len(shards)
        more = f" and {frozen} frozen" if frozen > 0 else ""
        yield f"    {group['algorithm']:<6} {len(shards):>5} parameters{more}: {values}"


def _state(binding: Binding) -> Iterator[str]:
    count: Counter[tuple[str, str, bool]] = Counter()
    nbytes: Counter[tuple[str, str, bool]] = Counter()
    for _, stored in binding.stored():
        key = (stored.label, stored.codec.name, stored.layout.pinned)
        count[key] += 1
        nbytes[key] += stored.nbytes
    for (label, codec, pinned), n in count.items():
        where = " on the host, read and written by every step" if pinned else ""
        yield f"    {label:<16} {codec:<9} {n:>5} tensors {nbytes[label, codec, pinned]:>16,} B{where}"


def _layouts(plan: Plan, index: int) -> Iterator[str]:
    """One line for all matrices that lie alike."""
    for geometry, count in Counter(matrix.geometry for matrix in plan.matrices).items():
        held = [f"{piece.rect.rows} x {piece.rect.cols}" for piece in held_by(index, geometry)]
        kind = "runs" if geometry.flat else "pieces"
        cut = f"in {len(geometry.pieces)} {kind}" if len(geometry.pieces) > 1 else "whole"
        yield (
            f"    {geometry.rows} x {geometry.cols}: {count} matrices {cut}{_wanted(geometry)}; "
            f"here {', '.join(held) or 'none'}"
        )


def _wanted(geometry: Geometry) -> str:
    most = max(len(piece.wanted_by) for piece in geometry.pieces)
    return f", each wanted by {most} ranks" if geometry.replicated else ""


def _plan(plan: Plan, index: int, binding: Binding, options: Options) -> Iterator[str]:
    memory = PolarMemory.of(
        schedule(options.polar, options.polar_steps), options.polar_form, options.polar_dtype, binding.device
    )
    loads = loads_of(plan, wire_format(options.wire), memory)
    owned = Counter(plan.owners)
    yield (
        f"    owners: {_counts(owned[rank] for rank in range(plan.ranks))} matrices a rank, "
        f"{owned[index]} here; the busiest does {plan.imbalance:.2f} times the mean"
    )
    sizes = (sum(len(bundle.matrices) for bundle in chunk.bundles) for chunk in plan.chunks)
    yield f"    chunks: {len(plan.chunks)} of {_counts(sizes)} matrices"
    yield f"    buffers {loads.buffers[index]:,} B, polar factors {loads.polar[index]:,} B, for a step"
    yield f"    sent {loads.sent[index]:,} B a step, as {options.wire}; {loads.flops[index]:,} FLOPs of polar factors"


def _counts(numbers: Iterable[int]) -> str:
    found = list(numbers)
    return f"{min(found)} to {max(found)}" if min(found) != max(found) else str(found[0])


def _shown(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return "this process"
    consecutive = list(ranks) == list(range(ranks[0], ranks[-1] + 1))
    return f"ranks {ranks[0]} to {ranks[-1]}" if consecutive else f"ranks {', '.join(map(str, ranks))}"
