"""Time, state and extra peak memory of one optimizer step on one GPU, beside torch's own optimizers, and beside those
of bitsandbytes, torchao and gram-newton-schulz where they are installed.

    python benchmarks/step.py [--out step.json] [--only NAME ...]

The parameters of a Llama with random bf16 gradients; nothing but the optimizer runs. Times are medians over steps, by
CUDA events. "state" is the memory of the GPU that an optimizer keeps between steps, "extra peak" the most that is
allocated during a step above that. What lies on the host, page-locked, a step reads and writes once, over the bus.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from muon_dist import DistMuon
from optimizers import by_algorithm

# Matrices of one layer, number of layers, and the embedding, of the Llama-3.2-1B parameters.
LAYER = [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)]
LAYERS = 16
EMBEDDING = (128256, 2048)
WARMUP, REPEATS = 3, 10


def parameters() -> list[tuple[str, nn.Parameter]]:
    """Named parameters with gradients, bf16, on the GPU."""
    shapes = [("embed_tokens.weight", EMBEDDING)]
    shapes += [(f"layers.{i}.{j}.weight", shape) for i in range(LAYERS) for j, shape in enumerate(LAYER)]
    named = [(name, nn.Parameter(torch.randn(s, device="cuda", dtype=torch.bfloat16) * 0.02)) for name, s in shapes]
    named += [(f"layers.{i}.norm.weight", nn.Parameter(torch.ones(2048, device="cuda"))) for i in range(2 * LAYERS + 1)]
    for _, p in named:
        p.grad = torch.randn_like(p) * 1e-3
    return named


def adamw(named: list[tuple[str, nn.Parameter]]) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW([p for _, p in named], fused=True)]


def torch_muon(named: list[tuple[str, nn.Parameter]]) -> list[torch.optim.Optimizer]:
    matrices, others = by_algorithm(named)
    return [torch.optim.Muon(matrices), torch.optim.AdamW(others, fused=True)]


def dist_muon(**options: Any) -> Callable[[list[tuple[str, nn.Parameter]]], list[torch.optim.Optimizer]]:
    return lambda named: [DistMuon(named, **options)]


def gram_muon(named: list[tuple[str, nn.Parameter]]) -> list[torch.optim.Optimizer]:
    from gram_newton_schulz import Muon

    matrices, others = by_algorithm(named)
    return [Muon(matrices), torch.optim.AdamW(others, fused=True)]


def bitsandbytes(named: list[tuple[str, nn.Parameter]]) -> list[torch.optim.Optimizer]:
    from bitsandbytes.optim import AdamW8bit

    return [AdamW8bit([p for _, p in named])]


def torchao(named: list[tuple[str, nn.Parameter]]) -> list[torch.optim.Optimizer]:
    from torchao.optim import AdamW8bit

    return [AdamW8bit([p for _, p in named])]


def adamw8(named: list[tuple[str, nn.Parameter]]) -> list[torch.optim.Optimizer]:
    """DistMuon's AdamW part alone."""
    return [DistMuon(named, adamw_state="dynamic8", overrides={"*": "adamw"})]


OPTIMIZERS: dict[str, Callable[[list[tuple[str, nn.Parameter]]], list[torch.optim.Optimizer]]] = {
    "AdamW fused, all": adamw,
    "bitsandbytes AdamW8bit, all": bitsandbytes,
    "torchao AdamW8bit, all": torchao,
    "DistMuon's 8-bit AdamW, all": adamw8,
    "torch.optim.Muon + AdamW fused": torch_muon,
    "gram-newton-schulz Muon + AdamW fused": gram_muon,
    "DistMuon fp32": dist_muon(momentum_state="fp32"),
    "DistMuon linear8": dist_muon(momentum_state="linear8"),
    "DistMuon linear8, offloaded": dist_muon(momentum_state="linear8", offload_momentum=True),
    "DistMuon lowrank4": dist_muon(momentum_state="lowrank4"),
    "DistMuon grasp4": dist_muon(momentum_state="grasp4"),
    "DistMuon nf4": dist_muon(momentum_state="nf4"),
    "DistMuon linear8, AdamW dynamic8": dist_muon(momentum_state="linear8", adamw_state="dynamic8"),
}


def measure(make: Callable[[list[tuple[str, nn.Parameter]]], list[torch.optim.Optimizer]]) -> dict[str, float]:
    named = parameters()
    given = torch.cuda.memory_allocated()
    optimizers = make(named)
    times = []
    extra = 0
    for repeat in range(WARMUP + REPEATS):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for optimizer in optimizers:
            optimizer.step()
        end.record()
        torch.cuda.synchronize()
        if repeat >= WARMUP:
            times.append(start.elapsed_time(end))
            extra = max(extra, torch.cuda.max_memory_allocated() - before)
    on_host = sum(
        value.nbytes
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if type(value) is torch.Tensor and value.is_pinned()
    )
    return {
        "milliseconds": statistics.median(times),
        "state_gib": (torch.cuda.memory_allocated() - given) / 2**30,
        "on_host_gib": on_host / 2**30,
        "extra_peak_gib": extra / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of names")
    arguments = parser.parse_args()
    figures = {}
    for name, make in OPTIMIZERS.items():
        if name.startswith(tuple(arguments.only)):
            try:
                figures[name] = measure(make)
            except ImportError as error:
                print(f"without {name}: {error}")
            torch.cuda.empty_cache()
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(f"Llama-3.2-1B parameters, bf16, one {machine['device']}, torch {machine['torch']}\n")
    print(f"{'optimizer':<40}{'step':>12}{'state':>12}{'on the host':>14}{'extra peak':>14}")
    for name, f in figures.items():
        gib = f"{f['state_gib']:>8.2f} GiB{f['on_host_gib']:>10.2f} GiB{f['extra_peak_gib']:>10.2f} GiB"
        print(f"{name:<40}{f['milliseconds']:>9.1f} ms{gib}")
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
