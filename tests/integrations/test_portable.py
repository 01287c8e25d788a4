"""State moves from any engine, layout and codec to any other: what is the same stays bit for bit, the rest is close.

The table in docs/checkpoints.md is what is found here. WRITE_DOCS=1 puts it there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
from torch import Tensor, nn

from muon_dist.checkpoint import LoadReport
from muon_dist.codecs import CODECS, FOUR_BIT_CODECS
from muon_dist.options import MomentumState
from tests.integrations.layouts import LAYOUTS, MoE, Trainer, deepspeed, ds_config, integration
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")

BEFORE, AFTER = range(3), range(3, 13)
# The quintic steps, whose standard form makes the least of sums in another order: bounds can be strict.
OPTIONS: dict[str, Any] = {"lr": 1e-2, "adamw_lr": 3e-3, "wire": "fp32", "block_size": 16, "polar": "polar_express"}
# By what happened to the momentum: relative error of encoding any state anew, and how far apart the weights may be ten
# steps later, relative to their way in these steps. Gradients are added up in another order, too.
BOUNDS = {"same": (0.0, 1e-4), "rows": (0.0, 1e-3), "encoded": (0.01, 0.05)}
FULL_BOUNDS = (0.0, 1e-5)  # in fp32, whatever happened
# In four bits a gradient that differs in its last bit moves codes by a level, and low-rank parts by a little.
FOUR_BIT_BOUNDS = {"same": (0.0, 0.01), "rows": (0.0, 0.05), "encoded": (0.1, 0.2)}

DOCS = Path(__file__).parents[2] / "docs" / "checkpoints.md"
START, END = "<!-- the table of tests/integrations/test_portable.py -->\n", "<!-- its end -->"


T = TypeVar("T")


class Run(NamedTuple):
    folder: Path
    saved: dict[str, Tensor]  # weights when the state was saved
    final: dict[str, Tensor]  # weights of the run that went on


def trainer(layout: str, codec: MomentumState, weights: dict[str, Tensor] | None = None) -> Trainer:
    adamw = "fp32" if codec == "fp32" else "dynamic8"
    return Trainer.of(layout, {**OPTIONS, "momentum_state": codec, "adamw_state": adamw}, weights)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, MomentumState], Run]:
    """A run in every layout with every codec."""
    root = tmp_path_factory.mktemp("saved")

    def save(layout: str) -> list[Run]:
        found = []
        for codec in CODECS:
            run, folder = trainer(layout, codec), root / layout / codec
            run.train(BEFORE)
            run.save(folder)
            saved = run.weights()
            run.train(AFTER)
            found.append(Run(folder, saved, run.weights()))
        return found

    return {
        (layout, codec): run for layout in LAYOUTS for codec, run in zip(CODECS, in_layout(layout, save), strict=True)
    }


def in_layout(layout: str, work: Callable[[str], T]) -> T:
    """What ``work(layout)`` gives on the first of the layout's ranks."""
    found: T = run_ranks(LAYOUTS[layout], lambda rank: work(layout))[0]
    return found


def moves(target: str) -> Iterator[tuple[str, MomentumState]]:
    """What is loaded into a layout: linear8 from everywhere, other codecs from the layout itself and from another."""
    names = list(LAYOUTS)
    here = names.index(target)
    for codec in CODECS:
        for source in names if codec == "linear8" else (target, names[here - 3]):
            yield source, codec


def test_every_layout_loads_what_every_layout_saved(runs: Mapping[tuple[str, MomentumState], Run]) -> None:
    def load(target: str) -> list[tuple[LoadReport, dict[str, Tensor]]]:
        found = []
        for move in moves(target):
            run = trainer(target, move[1], runs[move].saved)
            report = run.load(runs[move].folder)
            run.train(AFTER)
            found.append((report, run.weights()))
        return found

    table: dict[tuple[str, str], str] = {}
    worst: dict[tuple[str, str], tuple[float, float]] = {}
    for target in LAYOUTS:
        for move, (report, weights) in zip(moves(target), in_layout(target, load), strict=True):
            source, codec = move
            happened = what_happened(report)
            away = distance(weights, runs[move].final) / distance(runs[move].saved, runs[move].final)
            bounds = FOUR_BIT_BOUNDS if codec in FOUR_BIT_CODECS else BOUNDS
            error_bound, away_bound = FULL_BOUNDS if codec == "fp32" else bounds[happened]
            assert not report.skipped
            assert report.error <= error_bound, (move, target)
            assert away <= away_bound, (move, target)
            if source == target:
                assert not (*report.moved, *report.encoded)
                assert away == 0
            if codec == "linear8":
                table[source, target] = happened
            error, distance_ = worst.get((codec, happened), (0.0, 0.0))
            worst[codec, happened] = max(error, report.error), max(distance_, away)
    print("codec, what happened: error of encoding, distance after ten steps", worst)
    require_documented(table)


def test_experts_of_one_name_on_different_ranks_are_refused(tmp_path: Path) -> None:
    """DeepSpeed's MoE layers: the same name is another parameter on every rank."""

    def save(rank: int) -> None:
        layer = MoE(8, nn.Linear(8, 8), num_experts=2, ep_size=2)
        engine, *_ = deepspeed.initialize(model=layer, model_parameters=layer.parameters(), config=ds_config(0, {}))
        with pytest.raises(ValueError, match=r"experts.0.weight is the name of several.*\[0\] and \[1\]"):
            integration.save_state(engine, tmp_path / "state")

    run_ranks(2, save)


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return float(sum((one[name] - other[name]).double().square().sum() for name in one)) ** 0.5


def what_happened(report: LoadReport) -> str:
    """To the momentum, at worst."""
    for what, states in (("encoded", report.encoded), ("rows", report.moved)):
        if any(state.endswith("momentum_buffer") for state in states):
            return what
    return "same"


def require_documented(table: Mapping[tuple[str, str], str]) -> None:
    """The docs have the table; WRITE_DOCS=1 makes it so."""
    lines = [f"| saved by, loaded by | {' | '.join(LAYOUTS)} |", "|---" * (len(LAYOUTS) + 1) + "|"]
    lines += [f"| {source} | {' | '.join(table[source, target] for target in LAYOUTS)} |" for source in LAYOUTS]
    text = DOCS.read_text()
    before, rest = text.split(START)
    expected = "".join([before, START, "\n", "\n".join(lines), "\n\n", END, rest.split(END)[1]])
    if os.environ.get("WRITE_DOCS"):
        DOCS.write_text(expected)
    assert text == expected or os.environ.get("WRITE_DOCS"), "the table has changed: run this test with WRITE_DOCS=1"
