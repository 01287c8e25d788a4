"""Where ZeRO will keep parameters, told from their sizes, is where real DeepSpeed puts them."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

from muon_dist.forecast import forecast
from muon_dist.grouping import assign
from muon_dist.integrations import zero_runs
from muon_dist.integrations.deepspeed import describe
from muon_dist.integrations.zero_runs import calls_of_stage
from muon_dist.launch.peers import deepspeed_muon, in_deepspeeds_order
from muon_dist.memory import measured_state_bytes
from muon_dist.options import Options
from tests.integrations import layouts  # isort: split - DeepSpeed is imported there, in the right order
from tests.ranks import run_ranks

SUB_GROUP_ELEMENTS = 1000  # so that there are several sub-groups

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_runs_and_state_are_those_of_deepspeed(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = 2
    made = layouts.ds_config

    def with_small_sub_groups(stage: int, options: dict[str, Any]) -> dict[str, Any]:
        config = made(stage, options)
        config["zero_optimization"]["sub_group_size"] = SUB_GROUP_ELEMENTS
        return config

    monkeypatch.setattr(layouts, "ds_config", with_small_sub_groups)
    monkeypatch.setattr(zero_runs, "_SUB_GROUP_ELEMENTS", SUB_GROUP_ELEMENTS)

    def observe(_: int) -> tuple[int, dict[str, tuple[tuple[int, int], ...]], list[int]]:
        sent: list[int] = []
        all_to_all = dist.all_to_all_single

        def watched(received: torch.Tensor, given: torch.Tensor, out: list[int], into: list[int], **how: Any) -> object:
            sent.append(sum(n for peer, n in enumerate(into) if peer != dist.get_rank()))
            return all_to_all(received, given, out, into, **how)

        trainer = layouts.Trainer.of(f"ZeRO-{stage} x2", {})
        runs: dict[str, tuple[tuple[int, int], ...]] = {}
        bound = trainer.optimizer._bind

        def watched_bind() -> object:
            binding = bound()
            runs.update({s.name: getattr(s, "runs", ()) for s in binding.shards})
            return binding

        setattr(trainer.optimizer, "_bind", watched_bind)  # noqa: B010
        setattr(dist, "all_to_all_single", watched)  # noqa: B010
        trainer.optimizer.observer.observing = True
        trainer.train(range(1))
        seen = {name: float(value) for name, value in trainer.optimizer.observer.latest.items()}
        assert seen["update_rms"] > 0
        assert 0 < seen["quantisation_error"] < 0.02
        text = describe(trainer.module)
        assert ("in 2 runs" if stage == 3 else "whole") in text
        return measured_state_bytes(trainer.optimizer), runs, sent

    measured = run_ranks(ranks, observe)
    grouping = assign((name, p.to("meta")) for name, p in layouts.Model().named_parameters())
    groups = [[a for a in grouping if a.algorithm == algorithm] for algorithm in ("muon", "adamw")]
    calls = calls_of_stage(groups, stage, ranks)
    found = forecast(calls, ranks, Options(), torch.device("cpu"))
    assert found.state == tuple(state for state, _, _ in measured)
    assert found.sent == tuple(sum(sent) for _, _, sent in measured)
    assert stage < 3 or len(calls) > 2
    for _, runs, _ in measured:
        assert runs == {a.name: getattr(place, "runs", ()) for call in calls for a, place in call}


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_own_muon_keeps_what_the_estimate_says(stage: int) -> None:
    """At its fullest rank, within 3%: DeepSpeed pads, and counts steps."""
    ranks = 2

    def observe(_: int) -> int:
        torch.compiler.set_stance("force_eager")  # DeepSpeed compiles its Newton-Schulz, for minutes on CPU
        config = layouts.ds_config(stage, {})
        config["optimizer"] = {"type": "Muon", "params": {"lr": 1e-3, "torch_adam": True}}
        config["zero_optimization"]["reduce_scatter"] = False
        module: Any = layouts.Model()
        engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
        for step in range(2):
            engine.backward(engine(layouts.batch(step)))
            engine.step()
        staged = getattr(engine.optimizer, "_muon_pending_momentum", {}).values()
        return measured_state_bytes(engine.basic_optimizer) + sum(copy.nbytes for copy, _ in staged)

    measured = run_ranks(ranks, observe)
    grouping = assign((name, p.to("meta")) for name, p in layouts.Model().named_parameters())
    ordered = in_deepspeeds_order(grouping)
    groups = [[a for a in ordered if a.algorithm == algorithm] for algorithm in ("muon", "adamw")]
    estimated = deepspeed_muon(calls_of_stage(groups, stage, ranks), ranks, stage, gradient_bytes=4)
    assert max(estimated) == pytest.approx(max(measured), rel=0.03)
