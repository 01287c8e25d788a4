"""`muon-dist estimate`: what a job will need on its fullest rank, under DistMuon and under its peers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import torch

from muon_dist.forecast import Forecast, forecast
from muon_dist.grouping import Assignment, Grouping, assign
from muon_dist.integrations.zero_runs import calls_of_stage
from muon_dist.launch.config import EstimateConfig, UsageError
from muon_dist.launch.peers import Calls, adamw, adamw8bit, deepspeed_muon, fp32_muon, in_deepspeeds_order
from muon_dist.launch.shapes import read_shapes
from muon_dist.memory import parts
from muon_dist.options import Options
from muon_dist.places import Placed, row_shards

KEPT = ("parameters", "gradients", "state")
COLUMNS = (*KEPT, "kept", "workspace")
BYTES = {"fp32": 4, "bf16": 2}


@dataclasses.dataclass(frozen=True)
class Row:
    """Bytes of device memory on the rank that has the most. ``workspace`` is what DistMuon's step needs beside what is
    kept, and gives back: the activations are gone by then. A peer's is not known."""

    name: str
    parameters: int
    gradients: int
    state: int
    workspace: int | None = None

    @property
    def kept(self) -> int:
        return self.parameters + self.gradients + self.state


@dataclasses.dataclass(frozen=True)
class Job:
    """How parameters lie: ``stage`` is ZeRO's, None for torch's engines."""

    calls: Calls
    ranks: int
    stage: int | None
    dtype: str

    @cached_property
    def shards(self) -> list[int]:
        """Elements of each rank's own parts."""
        found = [0] * self.ranks
        for part in parts(placed for call in self.calls for placed in call):
            found[part.rank] += part.alike * part.elements
        return found

    @property
    def whole(self) -> list[int]:
        """Elements of all parameters, for each rank."""
        return [sum(a.parameter.numel() for call in self.calls for a, _ in call)] * self.ranks

    def parameters(self) -> list[int]:
        """Bytes: what the model computes with, and the fp32 values that ZeRO updates where these are others."""
        held = self.whole if self.stage in (0, 1, 2) else self.shards
        is_copied = self.stage in (1, 2) or (self.stage is not None and self.dtype != "fp32")
        return [BYTES[self.dtype] * n + 4 * part * is_copied for n, part in zip(held, self.shards, strict=True)]

    def gradients(self) -> list[int]:
        return [BYTES[self.dtype] * n for n in (self.whole if self.stage in (0, 1) else self.shards)]

    def row(self, name: str, state: Sequence[int], workspace: Sequence[int] | None = None) -> Row:
        parts = [self.parameters(), self.gradients(), state, workspace or [0] * self.ranks]
        fullest = max(range(self.ranks), key=lambda rank: sum(part[rank] for part in parts))
        row = Row(name, *(part[fullest] for part in parts))
        return row if workspace else dataclasses.replace(row, workspace=None)


def job_of(grouping: Iterable[Assignment], config: EstimateConfig, stage: int | None) -> Job:
    """The job of ``config``, or the same under ZeRO at ``stage``."""
    if stage is not None:
        # Vectors share AdamW's group unless embeddings are decayed, which they are not by default.
        groups = [[a for a in grouping if a.algorithm == algorithm] for algorithm in ("muon", "adamw")]
        return Job(
            calls_of_stage(filter(None, groups), stage, config.world_size), config.world_size, stage, config.dtype
        )
    shards = config.world_size // config.replicas if config.engine == "fsdp2" else 1
    place = row_shards(shards, config.world_size // shards)
    return Job([[Placed(a, place) for a in grouping]], config.world_size, None, config.dtype)


def estimate(grouping: Grouping, config: EstimateConfig) -> tuple[list[Row], Forecast]:
    """A row for every optimizer, DistMuon's last, and what DistMuon costs."""
    job = job_of(grouping, config, config.zero_stage)
    options = Options(
        momentum_state=config.momentum_state,
        block_size=config.block_size,
        adamw_state=config.adamw_state,
        wire=config.wire,
        chunk_bytes=config.chunk_bytes,
        offload_momentum=config.offload_momentum,
    )
    try:
        found = forecast(job.calls, job.ranks, options)
    except ValueError as error:
        raise UsageError(str(error)) from None
    on_device = [state - offloaded for state, offloaded in zip(found.state, found.offloaded, strict=True)]
    # DeepSpeed's Muon where DeepSpeed is: the stage that is nearest to the engine.
    stage = (3 if config.engine == "fsdp2" else 0) if config.zero_stage is None else config.zero_stage
    zero = job_of(in_deepspeeds_order(grouping), config, stage)
    rows = [
        job.row("AdamW", adamw(job.calls, job.ranks)),
        job.row("AdamW, 8-bit (bitsandbytes)", adamw8bit(job.calls, job.ranks)),
        job.row("Muon, fp32 momentum", fp32_muon(job.calls, job.ranks)),
        zero.row(f"DeepSpeed's Muon, ZeRO-{stage}", deepspeed_muon(zero.calls, zero.ranks, stage, BYTES[config.dtype])),
        job.row(f"DistMuon, {config.momentum_state}", on_device, found.workspace),
    ]
    return rows, found


def run(model: str, config: EstimateConfig) -> None:
    """Prints the tables; writes and draws what is asked for."""
    grouping = assign(read_shapes(model).items())
    rows, found = estimate(grouping, config)
    print(describe(model, grouping, config))
    print()
    print(table(rows))
    print()
    print(step(found))
    if config.out:
        figures = {
            "model": model,
            "config": dataclasses.asdict(config),
            "rows": [dataclasses.asdict(row) for row in rows],
            "buffers": max(found.buffers),
            "polar": max(found.polar),
            "offloaded": max(found.offloaded),
            "sent": max(found.sent),
            "flops": max(found.flops),
        }
        config.out.write_text(json.dumps(figures, indent=2, default=str) + "\n")
    if config.plot:
        draw(rows, f"{model}, {config.world_size} ranks, {config.engine}, {config.dtype}", config.plot)


def describe(model: str, grouping: Grouping, config: EstimateConfig) -> str:
    total = sum(a.parameter.numel() for a in grouping)
    matrices = [a for a in grouping if a.algorithm == "muon"]
    elements = sum(a.parameter.numel() for a in matrices)
    stage = "" if config.zero_stage is None else f" ZeRO-{config.zero_stage}"
    replicas = f", {config.replicas} replicas" if config.replicas > 1 else ""
    return (
        f"{model}: {total:,} parameters, {elements:,} of them in {len(matrices)} matrices for Muon\n"
        f"{config.world_size} ranks, {config.engine}{stage}{replicas}, {config.dtype}; bytes on the fullest rank"
    )


def table(rows: Sequence[Row]) -> str:
    unit, name = _unit(max(row.kept for row in rows))
    lines = [f"{'':<30}" + "".join(f"{column:>12}" for column in COLUMNS)]
    for row in rows:
        values = [getattr(row, column) for column in COLUMNS]
        cells = (f"{'-':>12}" if value is None else f"{value / unit:>8.2f} {name}" for value in values)
        lines.append(f"{row.name:<30}" + "".join(cells))
    return "\n".join(lines)


def step(found: Forecast) -> str:
    """What a step of DistMuon costs, in words."""
    if not found.plans:
        return "no matrices: nothing travels"
    mean = sum(found.flops) / len(found.flops)
    chunks = sum(len(plan.chunks) for plan in found.plans)
    sent, buffers, polar = (_shown(max(each)) for each in (found.sent, found.buffers, found.polar))
    host = max(found.offloaded)
    offloaded = f";\n{_shown(host)} of momentum in memory of the host, which a step reads and writes" if host else ""
    return (
        f"a step of DistMuon: {max(found.flops) / 1e12:.3g} TFLOP of polar factors on the busiest rank, "
        f"{max(found.flops) / mean:.2f} times the mean;\n"
        f"{sent} sent by the rank that sends most; buffers {buffers}, polar factors {polar}; chunks: {chunks}"
        f"{offloaded}"
    )


def _unit(largest: int) -> tuple[int, str]:
    return next((unit for unit in ((2**30, "GiB"), (2**20, "MiB")) if largest >= unit[0]), (2**10, "KiB"))


def _shown(nbytes: int) -> str:
    unit, name = _unit(nbytes)
    return f"{nbytes / unit:.2f} {name}"


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """A stacked bar for each optimizer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    unit, name = _unit(max(row.kept for row in rows))
    figure, axis = plt.subplots(figsize=(9, 0.6 * len(rows) + 1.6), layout="constrained")
    left = torch.zeros(len(rows))
    names = [row.name for row in rows]
    for part in (*KEPT, "workspace"):
        sizes = torch.tensor([(getattr(row, part) or 0) / unit for row in rows])
        axis.barh(
            names, sizes.tolist(), left=left.tolist(), label=part if part in KEPT else "workspace of DistMuon's step"
        )
        left += sizes
    axis.margins(x=0.02)
    axis.invert_yaxis()
    axis.set(title=title, xlabel=f"{name} on the fullest rank")
    axis.legend(loc="upper center", bbox_to_anchor=(0.4, -0.25), ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
