"""Parameters of several matrices train alike on every engine: fused weights, experts, convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.layouts import LAYOUTS, MORE_LAYOUTS, Trainer
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 4
OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "adamw_lr": 3e-3,
    "momentum_state": "fp32",
    "wire": "fp32",
    "splits": {"conv.weight": [40, 14, 14], "down.weight": [11, 11, 11, 11], "experts": [12, 8]},
}


def weights(layout: str, **changes: Any) -> dict[str, Tensor]:
    """After some steps, on the first rank."""

    def run(rank: int) -> dict[str, Tensor]:
        trainer = Trainer.of(layout, {**OPTIONS, **changes})
        trainer.train(range(STEPS))
        return trainer.weights()

    found: dict[str, Tensor] = run_ranks({**LAYOUTS, **MORE_LAYOUTS}[layout], run)[0]
    return found


@pytest.fixture(scope="module")
def single() -> dict[str, Tensor]:
    return weights("single")


@pytest.mark.parametrize("layout", [name for name in (*LAYOUTS, *MORE_LAYOUTS) if name != "single"])
def test_matrices_in_parameters_train_as_in_a_single_process(layout: str, single: dict[str, Tensor]) -> None:
    start = Trainer.initial_weights()
    for name, ours in weights(layout).items():
        # Gradients are added up in another order.
        assert float((ours - single[name]).norm()) < 1e-4 * float((single[name] - start[name]).norm()), name


def test_splits_change_the_update(single: dict[str, Tensor]) -> None:
    """So that the tests above have something to compare."""
    fused = weights("single", splits={})
    for name in ("conv.weight", "down.weight", "experts"):
        assert not torch.allclose(fused[name], single[name], atol=1e-4)
