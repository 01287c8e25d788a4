"""What optimizer state costs a training run on one GPU: peak memory, and the largest model that fits.

    python benchmarks/memory.py [--gib 40] [--out memory.json]

Trains Llamas of the "1b" preset's width for two steps: fp32 weights and gradients, bf16 arithmetic, one sequence of
512 bytes. "peak" is the most memory that is allocated with the preset's own 22 layers. "fits" is the largest number of
layers that trains within ``--gib``: found by training it, and one layer more, which does not.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from muon_dist.launch.models import BYTE_VOCABULARY, PRESETS, build_llama
from muon_dist.memory import measured_state_bytes
from step import adamw, dist_muon, torch_muon

PRESET = PRESETS["1b"]
SEQUENCE = 512
STEPS = 2

Build = Callable[[list[tuple[str, nn.Parameter]]], list[torch.optim.Optimizer]]
OPTIMIZERS: dict[str, Build] = {
    "AdamW, fp32 states": adamw,
    "torch.optim.Muon, fp32": torch_muon,
    "DistMuon fp32": dist_muon(momentum_state="fp32"),
    "DistMuon linear8": dist_muon(momentum_state="linear8"),
    "DistMuon lowrank4": dist_muon(momentum_state="lowrank4"),
}


def peak(build: Build, layers: int) -> tuple[int, int, int]:
    """Bytes at the peak, bytes of state, and parameters. Raises torch.OutOfMemoryError."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    device = torch.device("cuda", torch.cuda.current_device())
    model = build_llama(replace(PRESET, layers=layers), SEQUENCE, device, seed=0)
    optimizers = build(list(model.named_parameters()))
    tokens = torch.randint(BYTE_VOCABULARY, (1, SEQUENCE), device=device)
    for _ in range(STEPS):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.cuda.synchronize()
    state = sum(measured_state_bytes(optimizer) for optimizer in optimizers)
    return torch.cuda.max_memory_allocated(), state, sum(p.numel() for p in model.parameters())


def fits(build: Build, layers: int, limit: int) -> bool:
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties().total_memory)
    try:
        peak(build, layers)
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return True


def most_layers(build: Build, first_guess: int, limit: int) -> int:
    """Walks from a guess to the border."""
    layers = first_guess
    while fits(build, layers + 1, limit):
        layers += 1
    while not fits(build, layers, limit):
        layers -= 1
    return layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=40)
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    given = parser.parse_args()
    limit = int(given.gib * 2**30)
    figures = {}
    for name, build in OPTIMIZERS.items():
        small, _, _ = peak(build, PRESET.layers // 2)
        total, state, parameters = peak(build, PRESET.layers)
        a_layer = (total - small) / (PRESET.layers - PRESET.layers // 2)
        # The allocator cannot use all of what it has: begin a little lower.
        layers = most_layers(build, int(PRESET.layers + (0.97 * limit - total) / a_layer), limit)
        per_layer = parameters // PRESET.layers
        figures[name] = {
            "peak": total,
            "state": state,
            "parameters": parameters,
            "layers": layers,
            "parameters_that_fit": parameters + (layers - PRESET.layers) * per_layer,
        }
        print(name, figures[name], flush=True)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(f"\nLlamas of 2048 columns, one {machine['device']}, torch {machine['torch']}\n")
    print(f"{'optimizer':<26}{'state':>11}{'peak, 1b':>12}{f'fits in {given.gib:g} GiB':>20}")
    for name, f in figures.items():
        fitting = f"{f['parameters_that_fit'] / 1e9:.2f} B, {f['layers']} layers"
        print(f"{name:<26}{f['state'] / 2**30:>7.2f} GiB{f['peak'] / 2**30:>8.2f} GiB{fitting:>20}")
    if given.out:
        given.out.write_text(json.dumps({"machine": machine, "gib": given.gib, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
