"""Draws the kernels of a Chrome trace that `scaling.py --trace` wrote: what runs on which stream, and what under what.

python benchmarks/trace_plot.py trace/llama-1b-...-2.json --out overlap.png [--from 10 --to 20]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import Patch

# The first whose words are part of a kernel's name.
KINDS = {
    "exchange": ("nccl",),
    "accumulate": ("_accumulate", "_store", "_encode", "_decode", "_unit"),
    "apply": ("_apply",),
    "AdamW": ("_adamw",),
    "polar factor": ("_chain", "_symmetric_product", "nvjet", "gemm", "cutlass", "_scale", "_measure", "_combine"),
    "other": ("",),
}
Span = tuple[str, float, float]  # kind, start, milliseconds


def kind_of(name: str) -> str:
    return next(kind for kind, words in KINDS.items() if any(word in name for word in words))


def read(path: Path) -> dict[int, list[Span]]:
    """Spans by stream, in milliseconds from the first kernel."""
    events = [
        event
        for event in json.loads(path.read_text())["traceEvents"]
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    first = min(event["ts"] for event in events)
    streams: dict[int, list[Span]] = defaultdict(list)
    for event in events:
        span = kind_of(event["name"]), (event["ts"] - first) / 1e3, event["dur"] / 1e3
        streams[event["args"]["stream"]].append(span)
    return streams


def role(spans: list[Span]) -> str:
    """What a stream is for, by what runs on it."""
    kinds = {kind for kind, _, _ in spans}
    return "NCCL" if "exchange" in kinds else "current stream" if "polar factor" in kinds else "side stream"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--from", type=float, default=0, dest="start", help="milliseconds")
    parser.add_argument("--to", type=float, dest="stop")
    parser.add_argument("--out", type=Path, default=Path("overlap.png"))
    given = parser.parse_args()
    streams = sorted(read(given.trace).items(), key=lambda item: role(item[1]))
    colours = dict(zip(KINDS, pyplot.get_cmap("tab10").colors, strict=False))
    figure, axes = pyplot.subplots(figsize=(12, 0.7 * len(streams) + 1.4), layout="constrained")
    for lane, (_, spans) in enumerate(streams):
        for kind in KINDS:
            bars = [(start, duration) for k, start, duration in spans if k == kind]
            axes.broken_barh(bars, (lane - 0.4, 0.8), color=colours[kind])
    axes.set_yticks(range(len(streams)), [role(spans) for _, spans in streams])
    axes.set(xlabel="milliseconds", xlim=(given.start, given.stop))
    seen = {kind for _, spans in streams for kind, _, _ in spans}
    handles = [Patch(color=colours[kind], label=kind) for kind in KINDS if kind in seen]
    axes.legend(handles=handles, ncols=len(handles), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    figure.savefig(given.out, dpi=120)


if __name__ == "__main__":
    main()
