"""What a finished run left, as the tests compare it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from muon_dist.launch.metrics import read_records


def series(run: Path, kind: str, value: str) -> dict[int, float]:
    """A value of the records, by step."""
    return {record["step"]: record[value] for record in read_records(run / "metrics.jsonl") if record["kind"] == kind}


def losses(run: Path, kind: str) -> dict[int, float]:
    return series(run, kind, "loss")


def result(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "result.json").read_text())
    return content
