"""Runs side by side: summary.json, metrics.jsonl, loss.png and a table, from the folders that `muon-dist train` left.

python -m muon_dist.launch.summary runs/quickstart
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from muon_dist.launch.ds_config import DIST_MUON
from muon_dist.launch.metrics import read_records


@dataclass(frozen=True)
class Run:
    name: str
    result: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def optimizer(self) -> str:
        config = self.result["config"]
        ds_config = self.result.get("ds_config")
        if ds_config and ds_config["optimizer"]["type"] != DIST_MUON:
            return f"deepspeed {ds_config['optimizer']['type']}"
        name: str = config["optimizer"]
        return f"{name} {config['momentum_state']}" if name == "dist_muon" else name

    @property
    def steps(self) -> int:
        return int(self.result["steps"])

    @property
    def validation_loss(self) -> float:
        return float(self.result["validation_loss"])

    def curve(self, kind: str) -> tuple[list[int], list[float]]:
        points = [(record["step"], record["loss"]) for record in self.records if record["kind"] == kind]
        return [step for step, _ in points], [loss for _, loss in points]


def load_runs(folder: Path) -> list[Run]:
    """Every finished run in the folder, the longest first."""
    runs = [
        Run(path.parent.name, json.loads(path.read_text()), read_records(path.parent / "metrics.jsonl"))
        for path in sorted(folder.glob("*/result.json"))
    ]
    if not runs:
        raise FileNotFoundError(f"no finished run (*/result.json) in {folder}; `muon-dist train --out` makes one")
    return sorted(runs, key=lambda run: -run.steps)


def trained(runs: list[Run]) -> list[Run]:
    """The runs whose losses compare: as long as the longest. Shorter ones only had their state measured."""
    return [run for run in runs if run.steps == runs[0].steps]


def differences_to_fp32(runs: list[Run]) -> dict[str, float]:
    """Relative difference of each run's validation loss to that of fp32 momentum, by run name."""
    baseline = next((run for run in trained(runs) if run.optimizer == "dist_muon fp32"), None)
    if baseline is None:
        return {}
    return {
        run.name: run.validation_loss / baseline.validation_loss - 1 for run in trained(runs) if run is not baseline
    }


def summarise(runs: list[Run]) -> dict[str, Any]:
    first = runs[0].result
    shared = ("world_size", "device", "parameters", "versions", "platform")
    differences = differences_to_fp32(runs)
    return {
        "model": first["config"]["model"],
        "engine": first["config"]["engine"],
        **{key: first[key] for key in shared},
        "relative_difference_to_fp32": differences,
        "runs": {
            run.name: {
                "optimizer": run.optimizer,
                "steps": run.steps,
                "seconds": run.result["seconds"],
                "validation_loss": run.validation_loss,
                "state_bytes_per_rank": run.result["state_bytes_per_rank"],
            }
            for run in runs
        },
    }


def write_records(runs: list[Run], path: Path) -> None:
    """The records of all runs in one file, each with the name of its run."""
    lines = [json.dumps({"run": run.name, **record}) for run in runs for record in run.records]
    path.write_text("".join(f"{line}\n" for line in lines))


def plot(runs: list[Run], path: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, run in enumerate(trained(runs)):
        axes.plot(*run.curve("train"), color=f"C{index}", alpha=0.35, linewidth=1)
        axes.plot(
            *run.curve("eval"), color=f"C{index}", marker="o", label=f"{run.optimizer}: {run.validation_loss:.4f}"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats/byte)")
    axes.set_title("validation loss (dots), training loss (thin)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def table(runs: list[Run]) -> str:
    differences = differences_to_fp32(runs)
    rows = [("optimizer", "steps", "seconds", "val loss", "vs fp32", "state/rank", "estimated")]
    for run in runs:
        compares = run in trained(runs)
        state = {name: "-" if b is None else f"{b:,} B" for name, b in run.result["state_bytes_per_rank"].items()}
        rows.append(
            (
                run.optimizer,
                str(run.steps),
                f"{run.result['seconds']:.0f}",
                f"{run.validation_loss:.4f}" if compares else "-",
                f"{differences[run.name]:+.2%}" if run.name in differences else "-",
                state["measured"],
                state["estimated"],
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        others = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *others]))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the runs in a folder: summary.json, loss.png, a table.")
    parser.add_argument("folder", type=Path, help="holds one folder a run")
    folder: Path = parser.parse_args().folder
    runs = load_runs(folder)
    (folder / "summary.json").write_text(json.dumps(summarise(runs), indent=2) + "\n")
    write_records(runs, folder / "metrics.jsonl")
    plot(runs, folder / "loss.png")
    print(table(runs))
    print(f"\nwritten: {folder}/summary.json, {folder}/metrics.jsonl, {folder}/loss.png")


if __name__ == "__main__":
    main()
