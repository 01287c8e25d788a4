"""Draws what scaling.py wrote: the time of a step by the number of ranks, a panel a model and measurement.

python benchmarks/scaling_plot.py scaling.json --out scaling.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(rows: list[dict[str, Any]], title: str, out: Path) -> None:
    panels = list(dict.fromkeys((row["model"], row["measurement"]) for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        shown = [row for row in rows if (row["model"], row["measurement"]) == panel]
        for i, optimizer in enumerate(dict.fromkeys(row["optimizer"] for row in shown)):
            points = sorted((r["ranks"], r["milliseconds"]) for r in shown if r["optimizer"] == optimizer)
            ranks, times = zip(*points, strict=True)
            axis.plot(ranks, times, marker="o", color=f"C{i}", label=optimizer)
            if panel[1].endswith("strong"):
                axis.plot(ranks, [times[0] * ranks[0] / n for n in ranks], ":", color=f"C{i}")
        axis.set(title=", ".join(panel), xlabel="ranks", ylabel="ms a step", xscale="log", yscale="log")
        axis.set_xticks(sorted({row["ranks"] for row in shown}), labels=sorted({row["ranks"] for row in shown}))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    figure.suptitle(f"{title}; dotted: perfect scaling")
    figure.savefig(out, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="what scaling.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    arguments = parser.parse_args()
    content = json.loads(arguments.file.read_text())
    draw(content["rows"], f"{content['machine']['device']}, torch {content['machine']['torch']}", arguments.out)


if __name__ == "__main__":
    main()
