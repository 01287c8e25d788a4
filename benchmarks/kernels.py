"""The element-wise kernels on one GPU against what the memory can do, and AdamW beside torch's fused one.

    python benchmarks/kernels.py [--out kernels.json]

"share" is the bytes that have to be read and written, over the time, relative to a copy of the same size.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from muon_dist.codecs import Codec, make_codec, make_low_rank_codec
from muon_dist.codecs.lowrank import LowRank
from muon_dist.kernels import adamw, batches
from muon_dist.kernels.lowrank import Pieces
from muon_dist.layout import Extent
from muon_dist.options import RowWiseState
from muon_dist.wire import wire_format

SHAPE = (8192, 8192)
PIECES = 4  # of accumulate and apply, in one launch
REPEATS = 10


def milliseconds(function: Callable[[], object]) -> float:
    """Best of three runs of ``REPEATS`` calls, a call."""
    for _ in range(3):
        function()
    best = float("inf")
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPEATS):
            function()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / REPEATS)
    return best


def stored(codec: Codec) -> dict[str, Tensor]:
    return {
        name: torch.zeros(spec.shape, dtype=spec.dtype, device="cuda") for name, spec in codec.buffers(SHAPE).items()
    }


def nbytes(buffers: dict[str, Tensor]) -> int:
    return sum(buffer.nbytes for buffer in buffers.values())


def copying() -> tuple[float, int]:
    source = torch.randn(2 * SHAPE[0], SHAPE[1], device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return milliseconds(lambda: target.copy_(source)), 2 * source.nbytes


def accumulating(state: str, dtype: torch.dtype) -> tuple[float, int]:
    codec, wire = make_codec(state), wire_format("bf16")  # type: ignore[arg-type]
    gradients = [torch.randn(SHAPE, device="cuda", dtype=dtype) for _ in range(PIECES)]
    momenta = [stored(codec) for _ in range(PIECES)]
    packed = [torch.empty(wire.nbytes(*SHAPE), dtype=torch.uint8, device="cuda") for _ in range(PIECES)]

    entries = [
        batches.Entry.of(g, g, p, wire.for_kernels(p, *SHAPE), codec.for_kernels(m))
        for g, m, p in zip(gradients, momenta, packed, strict=True)
    ]

    def run() -> None:
        batch = batches.AccumulateBatch()
        for entry, g, p in zip(entries, gradients, packed, strict=True):
            assert entry is not None
            assert batch.take(entry, g, p, 0.95, True)
        batch.launch()

    moved = sum(g.nbytes + 2 * nbytes(m) + p.nbytes for g, m, p in zip(gradients, momenta, packed, strict=True))
    return milliseconds(run), moved


def low_rank_pass(first: bool) -> tuple[float, int]:
    """The element-wise passes over momenta in lowrank4; the products between them are cuBLAS's."""
    wire, codec = wire_format("bf16"), make_low_rank_codec("lowrank4", 128, Extent(SHAPE, SHAPE))
    assert isinstance(codec, LowRank)
    gradients = [torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(PIECES)]
    rests = [stored(codec.residual) for _ in range(PIECES)]
    packed = [torch.empty(wire.nbytes(*SHAPE), dtype=torch.uint8, device="cuda") for _ in range(PIECES)]
    low = torch.randn((PIECES, *SHAPE), device="cuda", dtype=torch.bfloat16)
    encoded = [codec.residual.for_kernels(rest) for rest in rests]
    pieces = Pieces.of(gradients, encoded, [wire.for_kernels(p, *SHAPE) for p in packed], None)
    assert pieces is not None
    read = sum(g.nbytes + nbytes(r) for g, r in zip(gradients, rests, strict=True)) + low.nbytes
    if first:
        return milliseconds(lambda: pieces.accumulate(low, 0.95, True)), read + low.nbytes + sum(
            p.nbytes for p in packed
        )
    return milliseconds(lambda: pieces.store(low, low)), read + sum(nbytes(rest) for rest in rests)


def applying(dtype: torch.dtype) -> tuple[float, int]:
    wire = wire_format("bf16").back
    weights = [torch.randn(SHAPE, device="cuda", dtype=dtype) for _ in range(PIECES)]
    packed = [torch.zeros(wire.nbytes(*SHAPE), dtype=torch.uint8, device="cuda") for _ in range(PIECES)]

    entries = [batches.Entry.of(w, w, p, wire.for_kernels(p, *SHAPE)) for w, p in zip(weights, packed, strict=True)]

    def run() -> None:
        batch = batches.ApplyBatch()
        for entry, w, p in zip(entries, weights, packed, strict=True):
            assert entry is not None
            assert batch.take(entry, w, p, 0.999, 1e-3)
        batch.launch()

    return milliseconds(run), sum(2 * w.nbytes + p.nbytes for w, p in zip(weights, packed, strict=True))


def adamw_step(state: str, dtype: torch.dtype) -> tuple[float, int]:
    first, second = (make_codec(state, signed=signed) for signed in (True, False))  # type: ignore[arg-type]
    m, v = stored(first), stored(second)
    weight, gradient = (torch.randn(SHAPE, device="cuda", dtype=dtype) for _ in range(2))
    step = torch.ones((), device="cuda")

    rates = adamw.Rates.of(1e-6, (0.9, 0.95), 1e-8, 0.1)

    def run() -> None:
        adamw.adamw(weight, gradient, step, first.for_kernels(m), second.for_kernels(v), rates)

    return milliseconds(run), 2 * weight.nbytes + gradient.nbytes + 2 * nbytes(m) + 2 * nbytes(v)


def torch_adamw(dtype: torch.dtype) -> tuple[float, int]:
    parameter = torch.nn.Parameter(torch.randn(SHAPE, device="cuda", dtype=dtype))
    parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW([parameter], lr=1e-6, fused=True)
    return milliseconds(optimizer.step), 7 * parameter.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    arguments = parser.parse_args()
    bf16, fp32 = torch.bfloat16, torch.float32
    runs: dict[str, Callable[[], tuple[float, int]]] = {"copy": copying}
    for state in get_args(RowWiseState):
        runs[f"accumulate, {state}, bf16 gradients"] = lambda state=state: accumulating(state, bf16)  # type: ignore[misc]
    runs |= {
        "accumulate, linear8, fp32 gradients": lambda: accumulating("linear8", fp32),
        "lowrank4, before its factors follow": lambda: low_rank_pass(first=True),
        "lowrank4, after": lambda: low_rank_pass(first=False),
        "apply, bf16 weights": lambda: applying(bf16),
        "apply, fp32 weights": lambda: applying(fp32),
        "AdamW, fp32 weights and states": lambda: adamw_step("fp32", fp32),
        "AdamW, fp32 weights, dynamic8": lambda: adamw_step("dynamic8", fp32),
        "torch's fused AdamW, fp32 weights": lambda: torch_adamw(fp32),
        "AdamW, bf16 weights, fp32 states": lambda: adamw_step("fp32", bf16),
        "AdamW, bf16 weights, dynamic8": lambda: adamw_step("dynamic8", bf16),
    }
    figures: dict[str, Any] = {}
    for name, run in runs.items():
        took, moved = run()
        figures[name] = {"milliseconds": took, "terabytes_per_second": moved / took / 1e9}
    peak = figures["copy"]["terabytes_per_second"]
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version()}
    print(f"{SHAPE[0]}x{SHAPE[1]}, one {machine['device']}, torch {machine['torch']}\n")
    print(f"{'kernel':<40}{'time':>12}{'rate':>12}{'share':>8}")
    for name, f in figures.items():
        rate = f["terabytes_per_second"]
        print(f"{name:<40}{f['milliseconds']:>9.3f} ms{rate:>7.2f} TB/s{rate / peak:>8.0%}")
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
