"""What the DeepSpeed integration refuses, and what it says then; the options of a JSON file."""

from __future__ import annotations

import pytest
import torch

from muon_dist import DistMuon
from muon_dist.integrations.deepspeed import DistOrthogonal, read_options, register
from tests.integrations.test_deepspeed import config, deepspeed, model, steps, train
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_layout_that_is_not_understood_stops_every_rank() -> None:
    def run(rank: int) -> None:
        _, engine = train(2, 0)
        if rank == 1:
            engine.basic_optimizer.param_groups[0]["params"][0].data[5] += 1
        with pytest.raises(ValueError, match="rank 1: .* does not hold this parameter"):
            steps(engine, 0, 1)

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
