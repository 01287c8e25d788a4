"""What the DeepSpeed integration refuses, and what it says then; the options of a JSON file."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from muon_dist import DistMuon
from muon_dist.integrations.deepspeed import DistOrthogonal, read_options, register
from tests.integrations.test_deepspeed import MICRO_BATCHES, batch, config, deepspeed, model, steps, train, weights
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_layout_that_is_not_understood_stops_every_rank() -> None:
    def run(rank: int) -> None:
        _, engine = train(2, 0)
        if rank == 1:
            engine.basic_optimizer.param_groups[0]["params"][0].data[5] += 1
        with pytest.raises(ValueError, match="rank 1: .* does not hold this parameter"):
            steps(engine, 0, 1)
        with pytest.raises(NotImplementedError, match=r"during_backward\(\): DeepSpeed reduces, scales and clips"):
            engine.basic_optimizer.during_backward()

    run_ranks(2, run)


def test_a_plain_optimizer_in_a_flat_buffer_says_what_to_do() -> None:
    def run(rank: int) -> None:
        module = model()
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=DistMuon(module.named_parameters()),
            config={**config(2), "zero_allow_untested_optimizer": True},
        )
        with pytest.raises(ValueError, match=r"has shape \(\d+,\) now.*muon_dist\.integrations"):
            steps(engine, 0, 1)

    run_ranks(1, run)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_step_that_is_not_finite_is_skipped_whole_by_the_optimizer_or_by_deepspeed(stage: int) -> None:
    def run(rank: int) -> None:
        skipping = {"type": "DistMuon", "params": {"nonfinite": "skip"}}
        if stage > 0:
            with pytest.raises(ValueError, match=r"nonfinite='skip': ZeRO calls.*engine.skipped_steps"):
                train(stage, 1, optimizer=skipping)
        changes: dict[str, Any] = {"optimizer": skipping} if stage == 0 else {}
        _, engine = train(stage, 1, **changes)
        before = weights(engine.module)
        for _ in range(MICRO_BATCHES):
            engine.backward(engine(batch(1, 0)) * float("nan"))
            engine.step()
        assert all(torch.equal(a, b) for a, b in zip(weights(engine.module).values(), before.values(), strict=True))
        assert (engine.skipped_steps, engine.basic_optimizer.skipped_steps) == ((0, 1) if stage == 0 else (1, 0))
        steps(engine, 2, 3)
        assert not any(torch.equal(a, b) for a, b in zip(weights(engine.module).values(), before.values(), strict=True))

    run_ranks(1, run)


def test_options_of_a_json_file() -> None:
    read = read_options(
        {"lr": "auto", "betas": [0.8, 0.9], "eps": 1e-6, "polar_dtype": "float32", "adamw_lr": 1e-3, "wire": "auto"}
    )
    assert read == {"adamw_betas": (0.8, 0.9), "adamw_eps": 1e-6, "polar_dtype": torch.float32, "adamw_lr": 1e-3}
    with pytest.raises(TypeError, match="no option 'momentum_sate'; did you mean 'momentum_state'"):
        read_options({"momentum_sate": "linear8"})
    with pytest.raises(ValueError, match="momentum_state='int3': it must be one of"):
        DistOrthogonal(model().named_parameters(), momentum_state="int3")


def test_registration_may_be_repeated() -> None:
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    register()
    register()
    assert ZERO_SUPPORTED_OPTIMIZERS.count(DistOrthogonal) == 1
