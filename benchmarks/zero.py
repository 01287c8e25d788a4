"""DistMuon beside DeepSpeed's own Muon and AdamW, at ZeRO stages 2 and 3: bytes sent, state, time, memory, loss.

    torchrun --nproc-per-node 4 benchmarks/zero.py [--steps 5] [--out zero.json]

Ranks are processes on CPU (gloo), or on GPUs; ranks that share one GPU are told apart by ``--share-gpu``. "sent" is
what a rank sends to others inside ``engine.step()``, counted at each collective; at stage 2 that includes ZeRO's own
all-gather of the weights, at stage 3 there is none. "momentum" is what a rank keeps between steps for each of the
elements of the matrices that it would hold if they were cut evenly, DeepSpeed's staging copy included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from job import Job, start
from models import MODELS
from muon_dist.memory import measured_state_bytes
from traffic import Traffic
from training import DEEPSPEED_OPTIMIZERS, Zero, import_deepspeed

BATCHES = {"nano": (2, 64), "135m": (8, 512)}  # sequences a rank, and their length


def text_batches(sequences: int, length: int, device: torch.device) -> Iterator[Tensor]:
    """Windows of the Python standard library's bytes, others on every rank."""
    folder = Path(os.__file__).parent
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(dist.get_rank())
    while True:
        starts = torch.randint(len(tokens) - length, (sequences,), generator=generator)
        yield torch.stack([tokens[s : s + length] for s in starts.tolist()]).long().to(device)


def measure(optimizer: dict[str, Any], stage: int, size: str, steps: int, traffic: Traffic, job: Job) -> dict[str, Any]:
    """Trains a fresh model for ``steps`` steps; figures of rank 0, times as medians over the second half."""
    sequences, length = BATCHES[size]
    shapes = MODELS[size].parameters()
    matrices = sum(rows[0] * rows[1] for name, rows in shapes.items() if "layers" in name and len(rows) == 2)
    job.reset_memory()
    zero = Zero(MODELS[size], length, sequences, job.device, optimizer, stage)
    engine = zero.engine
    losses, whole, inside = [], [], []
    batches = text_batches(sequences, length, job.device)
    for _ in range(steps):
        tokens = next(batches)
        job.synchronize()
        started = time.perf_counter()
        loss = zero.backward(tokens)
        job.synchronize()
        middle = time.perf_counter()
        with traffic.counting():
            zero.step()
        job.synchronize()
        ended = time.perf_counter()
        whole.append(ended - started)
        inside.append(ended - middle)
        losses.append(loss.item())
    figures = {
        "sent_bytes": traffic.sent,
        "sent_per_matrix_element": traffic.sent / matrices,
        "state_bytes": measured_state_bytes(engine.basic_optimizer) + staging_bytes(engine.optimizer),
        "momentum_bytes_per_element": (momentum_bytes(engine.basic_optimizer) + staging_bytes(engine.optimizer))
        / (matrices / job.ranks),
        "step_ms": 1e3 * statistics.median(inside[steps // 2 :]),
        "whole_ms": 1e3 * statistics.median(whole[steps // 2 :]),
        "peak_gib": job.peak_gib(),
        "losses": losses,
    }
    zero.close()
    return figures


def momentum_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the entries of the state that hold momentum, ours or DeepSpeed's."""
    entries = [item for state in optimizer.state.values() for item in state.items()]
    return sum(value.nbytes for key, value in entries if "momentum" in key)


def staging_bytes(engine_optimizer: Any) -> int:
    """Of the copy of the momentum that DeepSpeed's Muon keeps at stages 1 and 2."""
    return sum(staged.nbytes for staged, _ in getattr(engine_optimizer, "_muon_pending_momentum", {}).values())


def table(stage: int, figures: dict[str, dict[str, Any]]) -> str:
    header = f"{'optimizer':<30}{'sent in step':>21}{'momentum':>13}{'state':>13}"
    lines = [f"ZeRO-{stage}", f"{header}{'step':>11}{'whole':>11}{'peak':>11}{'loss':>15}"]
    for name, f in figures.items():
        peak = f"{f['peak_gib']:>7.2f} GiB" if f["peak_gib"] else f"{'-':>11}"
        lines.append(
            f"{name:<30}{f['sent_bytes'] / 2**20:>8.2f} MiB {f['sent_per_matrix_element']:>5.2f} B/e"
            f"{f['momentum_bytes_per_element']:>9.3f} B/e{f['state_bytes'] / 2**20:>9.2f} MiB"
            f"{f['step_ms']:>8.1f} ms{f['whole_ms']:>8.1f} ms{peak}{f['losses'][0]:>8.2f}{f['losses'][-1]:>7.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=BATCHES, default="nano")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--share-gpu", action="store_true", help="all ranks on the first GPU")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    arguments = parser.parse_args()
    traffic = Traffic()  # before DeepSpeed takes its own references
    job = start(arguments.share_gpu)
    deepspeed = import_deepspeed()
    results = {}
    for stage in arguments.stages:
        figures = {
            name: measure(optimizer, stage, arguments.size, arguments.steps, traffic, job)
            for name, optimizer in DEEPSPEED_OPTIMIZERS.items()
        }
        results[f"ZeRO-{stage}"] = figures
        if job.rank == 0:
            print(table(stage, figures), flush=True)
    if job.rank == 0:
        machine = {**job.machine(), "ranks": job.ranks, "deepspeed": deepspeed.__version__}
        print(machine)
        if arguments.out:
            arguments.out.write_text(json.dumps({"machine": machine, "figures": results}, indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
