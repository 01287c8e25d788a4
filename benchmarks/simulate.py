"""Predicted step of DistMuon on 1 to 4096 GPUs, by the cost model of cost.py; first, the model against measurements.

    python benchmarks/simulate.py [--measured scaling.json] [--out simulate.json] [--plot simulate.png]

NVLink nodes of 8 with 50 GB/s a GPU between nodes, bf16 parameters and gradients under FSDP2. "exposed" is what the
step would take less if collectives took no time; "polar" is the busiest owner's; "ideal" is all polar factors' time
over the ranks; "memory" is a rank's parameters, gradients, optimizer states and exchange buffers. ``--measured`` adds
DistMuon's rows of step-strong that scaling.py wrote.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cost import Job, Machine, Prediction, batch_seconds, predict
from models import MODELS

# On one H200, from benchmarks/README.md.
POLAR_MS = {
    (16, 1024, 1024): 0.65,
    (16, 1024, 4096): 1.16,
    (8, 2048, 2048): 2.01,
    (8, 2048, 8192): 3.82,
    (4, 4096, 4096): 6.98,
    (4, 4096, 11008): 11.28,
    (4, 4096, 14336): 13.82,
    (1, 8192, 28672): 24.27,
}
STEP_MS = {("llama-1b", "fp32"): 36.7, ("llama-1b", "linear8"): 35.9}
# Ranks that hold a model of the name in the table; fewer do not have the memory.
RANKS = {
    "llama-8b": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024],
    "llama-70b": [8, 16, 32, 64, 128, 256, 512, 1024, 4096],
    "moe-1t": [64, 128, 256, 512, 1024, 2048, 4096],
}
REPLICAS = [("llama-8b", 8, 8), ("llama-8b", 64, 8), ("llama-70b", 64, 8), ("llama-70b", 512, 64)]


def against_measurements(machine: Machine, measured: Path | None) -> list[str]:
    """Predicted, measured and error, a line each."""
    pairs = [
        (f"polar {n}x{short}x{long}", 1e3 * batch_seconds(short, long, n, machine), took)
        for (n, short, long), took in POLAR_MS.items()
    ]
    for (name, state), took in STEP_MS.items():
        job = Job(MODELS[name], 1, state=state)  # type: ignore[arg-type]
        pairs.append((f"{name}, 1 rank, {state}", 1e3 * predict(job, machine).seconds, took))
    for row in json.loads(measured.read_text())["rows"] if measured else []:
        if row["measurement"] == "step-strong" and row["optimizer"].startswith("DistMuon"):
            _, state, wire = row["optimizer"].removesuffix(" wire").split(", ")
            job = Job(MODELS[row["model"]], row["ranks"], wire=wire, state=state)
            title = f"{row['model']}, {row['ranks']} ranks, {state}, {wire} wire"
            pairs.append((title, 1e3 * predict(job, machine).seconds, row["milliseconds"]))
    return [f"{name:<44}{model:>9.2f} ms{took:>9.2f} ms{model / took - 1:>+8.0%}" for name, model, took in pairs]


def line(title: str, job: Job, machine: Machine) -> tuple[str, dict[str, Any]]:
    """A row of a table, and its figures."""
    p: Prediction = predict(job, machine)
    ideal = p.polar / p.imbalance
    text = (
        f"{title:<26}{job.ranks:>6}{1e3 * p.seconds:>11.1f} ms{1e3 * p.exposed:>9.1f} ms{p.exposed / p.seconds:>5.0%}"
        f"{1e3 * p.polar:>10.1f} ms{1e3 * ideal:>9.1f} ms{p.imbalance:>7.2f}{p.chunks:>7}{p.busy:>6.0%}"
        f"{p.memory / 2**30:>9.1f} GiB"
    )
    return text, {"title": title, "ranks": job.ranks, "ideal": ideal, **dataclasses.asdict(p)}


def draw(rows: dict[str, list[dict[str, Any]]], out: Path) -> None:
    figure, axes = plt.subplots(1, len(rows), figsize=(5 * len(rows), 4), layout="constrained")
    for axis, (name, found) in zip(axes, rows.items(), strict=True):
        ranks = [row["ranks"] for row in found]
        for key, label, style in (("seconds", "step", "-o"), ("exposed", "exposed", "-s"), ("ideal", "ideal", ":")):
            axis.plot(ranks, [1e3 * row[key] for row in found], style, label=label, markersize=4)
        axis.set(title=name, xlabel="GPUs", xscale="log", yscale="log", ylabel="ms")
        axis.set_xticks(ranks, labels=map(str, ranks), rotation=60)
        axis.minorticks_off()
        axis.set_ylim(bottom=0.1)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle("predicted: linear8 momentum, bf16 wire, NVLink nodes of 8, 50 GB/s a GPU between nodes")
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, help="what scaling.py wrote")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--plot", type=Path, help="draw them here")
    arguments = parser.parse_args()
    machine = Machine()
    print(f"{'':<44}{'predicted':>12}{'measured':>12}{'error':>8}")
    print("\n".join(against_measurements(machine, arguments.measured)))
    print(
        f"\n{'':<26}{'GPUs':>6}{'step':>14}{'exposed':>17}{'polar':>13}{'ideal':>12}{'imb.':>7}{'chunks':>7}{'busy':>6}"
        f"{'memory':>13}"
    )
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, sizes in RANKS.items():
        for ranks in sizes:
            text, figures = line(name, Job(MODELS[name], ranks), machine)
            rows.setdefault(name, []).append(figures)
            print(text, flush=True)
    others = []
    for name, ranks, replicas in REPLICAS:
        others.append(line(f"{name}, {replicas} replicas", Job(MODELS[name], ranks, replicas), machine))
    for name, ranks in (("llama-8b", 8), ("llama-8b", 64), ("llama-70b", 512)):
        others.append(line(f"{name}, int8 wire", Job(MODELS[name], ranks, wire="int8"), machine))
    print("\n".join(text for text, _ in others))
    if arguments.out:
        found = [figures for model in rows.values() for figures in model] + [figures for _, figures in others]
        arguments.out.write_text(json.dumps({"machine": dataclasses.asdict(machine), "rows": found}, indent=2) + "\n")
    if arguments.plot:
        draw(rows, arguments.plot)


if __name__ == "__main__":
    main()
