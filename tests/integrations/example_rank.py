"""One rank of a job that runs an example and then writes down what DeepSpeed made of the optimizer.

torchrun -m tests.integrations.example_rank REPORT EXAMPLE [options of the example]
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import torch

import tests.integrations.without_kernels  # noqa: F401


def main() -> None:
    _, report, *sys.argv = sys.argv
    engine, losses = runpy.run_path(sys.argv[0])["main"]()
    optimizer = engine.basic_optimizer
    found = {
        "stage": engine.zero_optimization_stage(),
        "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
        "algorithms": {assignment.name: assignment.algorithm for assignment in optimizer.grouping()},
        "groups": [
            [group[key] for key in ("algorithm", "weight_decay", "param_names")] for group in optimizer.param_groups
        ],
        "losses": losses,
    }
    if os.environ["RANK"] == "0":
        Path(report).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    torch.distributed.destroy_process_group()
