"""Real DeepSpeed trains alike at every ZeRO stage and with every option, and as FSDP2 does."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")

import deepspeed  # in the parent, before ranks are forked
from deepspeed.moe.layer import MoE

import tests.integrations.without_kernels  # noqa: F401
from muon_dist import DistMuon
from muon_dist.grouping import Grouping
from muon_dist.integrations.deepspeed import DistOrthogonal
from muon_dist.memory import measured_state_bytes
from tests.ranks import run_ranks

STEPS, MICRO_BATCHES, CLIP = 20, 2, 0.5
OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "adamw_lr": 3e-3, "momentum_state": "fp32", "wire": "fp32"}
OPTIONS["polar"] = "polar_express"  # whose standard form makes the least of sums in another order: bounds can be strict

pytestmark = pytest.mark.filterwarnings("ignore")


class Model(nn.Module):
    """Odd shapes, so that no cut falls between rows at any number of ranks."""

    def __init__(self, tied: bool = False, frozen: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(61, 23)
        self.up = nn.Linear(23, 41)
        self.middle = nn.Linear(41, 37)
        self.down = nn.Linear(37, 23, bias=False)
        self.norm = nn.LayerNorm(23)
        self.lm_head = nn.Linear(23, 61, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        if frozen:
            self.up.requires_grad_(False)
            self.norm.bias.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed_tokens(tokens)
        h = h + self.down(torch.relu(self.middle(torch.relu(self.up(h)))))
        logits = self.lm_head(self.norm(h)).float()
        return functional.cross_entropy(logits.flatten(0, 1), (tokens.flatten() + 1) % 61)


def model(**kind: bool) -> Model:
    torch.manual_seed(0)
    return Model(**kind)


def batch(step: int, micro: int) -> Tensor:
    """This rank's part of a micro-batch of six sequences, which are the same at any number of ranks."""
    whole = torch.randint(61, (6, 16), generator=torch.Generator().manual_seed(100 * step + micro))
    return whole.chunk(dist.get_world_size())[dist.get_rank()]


def config(stage: int, **changes: Any) -> dict[str, Any]:
    base = {
        "train_micro_batch_size_per_gpu": 6 // dist.get_world_size(),
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": CLIP,
        "steps_per_print": 10**9,
        "optimizer": {"type": "DistMuon", "params": OPTIONS},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **changes.pop("zero", {})},
    }
    return {**base, **changes}


def whole(parameter: Tensor) -> Tensor:
    if hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().float().clone()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().float().clone()


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p) for name, p in module.named_parameters()}


def steps(engine: Any, first: int, last: int) -> None:
    for step in range(first, last):
        for micro in range(MICRO_BATCHES):
            engine.backward(engine(batch(step, micro)))
            engine.step()


def train(stage: int, last: int = STEPS, zero_init: bool = False, kind: Any = None, **changes: Any) -> Any:
    """The weights after training with DeepSpeed, and its engine."""
    settings = config(stage, **changes)
    with deepspeed.zero.Init(enabled=zero_init, config_dict_or_path=settings):
        module = model(**(kind or {}))
    if zero_init:  # torch's random numbers went elsewhere
        with deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=0):
            module.load_state_dict(model(**(kind or {})).state_dict())
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=settings)
    steps(engine, 0, last)
    return weights(module), engine


@cache
def fsdp2(ranks: int, last: int = STEPS, tied: bool = False, frozen: bool = False) -> dict[str, Tensor]:
    """What the weights have to be: the same training on FSDP2, whose updates equal a single process's."""

    def run(rank: int) -> dict[str, Tensor]:
        module = model(tied=tied, frozen=frozen)
        fully_shard(module, mesh=init_device_mesh("cpu", (ranks,)))
        optimizer = DistMuon(module.named_parameters(), **OPTIONS)
        for step in range(last):
            for micro in range(MICRO_BATCHES):
                (module(batch(step, micro)) / MICRO_BATCHES).backward()
            nn.utils.clip_grad_norm_(module.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        return weights(module)

    found: dict[str, Tensor] = run_ranks(ranks, run)[0]
    return found


def require_alike(found: list[dict[str, Tensor]], expected: dict[str, Tensor], tolerance: float, **kind: bool) -> None:
    """The distance relative to the way travelled; gradients are summed in another order. All ranks are identical."""
    start = weights(model(**kind))
    for name, theirs in expected.items():
        for ours in found:
            assert torch.equal(ours[name], found[0][name]), name
        travelled = float((theirs - start[name]).norm())
        assert float((found[0][name] - theirs).norm()) <= tolerance * travelled, name


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_trains_as_fsdp2(ranks: int, stage: int) -> None:
    require_alike(run_ranks(ranks, lambda rank: train(stage)[0]), fsdp2(ranks), 1e-5)


OFFLOAD = {"device": "cpu"}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "1, round robin": (1, {"zero": {"round_robin_gradients": True}}),
    "2, round robin": (2, {"zero": {"round_robin_gradients": True}}),
    "2, all-reduce": (2, {"zero": {"reduce_scatter": False}}),
    "2, overlapped, not contiguous": (2, {"zero": {"overlap_comm": True, "contiguous_gradients": False}}),
    "2, aligned parameters": (2, {"zero": {"parameter_alignment": True}}),
    "2, small buckets": (2, {"zero": {"reduce_bucket_size": 500, "allgather_bucket_size": 500}}),
    "2, offload": (2, {"zero": {"offload_optimizer": OFFLOAD}, "zero_force_ds_cpu_optimizer": False}),
    "3, sub-groups": (3, {"zero": {"sub_group_size": 900}}),
    "3, all-reduce": (3, {"zero": {"reduce_scatter": False}}),
    "3, overlapped": (3, {"zero": {"overlap_comm": True, "contiguous_gradients": True}}),
    "3, not contiguous": (3, {"zero": {"contiguous_gradients": False}}),
    "3, persistent parameters": (3, {"zero": {"stage3_param_persistence_threshold": 1000}}),
    "3, offload": (3, {"zero": {"offload_optimizer": OFFLOAD}}),
    "3, zero.Init": (3, {"zero_init": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_options_do_not_change_the_training(name: str) -> None:
    stage, changes = CASES[name]
    require_alike(run_ranks(2, lambda rank: train(stage, 4, **changes)[0]), fsdp2(2, 4), 1e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("kind", [{"tied": True}, {"frozen": True}])
def test_tied_and_frozen_parameters(stage: int, kind: dict[str, bool]) -> None:
    require_alike(run_ranks(2, lambda rank: train(stage, 4, kind=kind)[0]), fsdp2(2, 4, **kind), 1e-5, **kind)


BF16: dict[str, Any] = {"bf16": {"enabled": True}}
BF16_CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "0": (0, BF16),
    "1": (1, BF16),
    "1, BF16_Optimizer": (1, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),
    "3": (3, BF16),
}


@cache
def bf16_stage_2() -> dict[str, Tensor]:
    found: dict[str, Tensor] = run_ranks(2, lambda rank: train(2, 4, **BF16)[0])[0]
    return found


@pytest.mark.parametrize("name", BF16_CASES)
def test_bf16(name: str) -> None:
    """The model computes in bf16 with fp32 masters; gradients are added up in fp32 or in bf16, so only about alike."""
    stage, changes = BF16_CASES[name]
    require_alike(run_ranks(2, lambda rank: train(stage, 4, **changes)[0]), bf16_stage_2(), 0.2)


def test_the_step_of_a_constructor_changes_nothing() -> None:
    """DeepSpeed makes one with zero gradients at stage 0 in low precision."""

    def run(rank: int) -> None:
        _, engine = train(0, 0, **BF16)
        optimizer = engine.basic_optimizer
        masters = [p for group in optimizer.param_groups for p in group["params"]]
        assert all(torch.equal(p, p.bfloat16().float()) for p in masters)
        assert all(not value.any() for state in optimizer.state.values() for value in state.values())

    run_ranks(1, run)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_groups_keep_their_learning_rates(stage: int) -> None:
    def run(rank: int) -> dict[str, float]:
        found: list[dict[str, float]] = []
        for client in (False, True):
            module = model()
            slow = [(n, p) for n, p in module.named_parameters() if n.startswith(("up", "lm_head"))]
            fast = [(n, p) for n, p in module.named_parameters() if not n.startswith(("up", "lm_head"))]
            groups: list[dict[str, Any]] = [{"params": slow, "lr": 1e-4, "adamw_lr": 1e-5}, {"params": fast}]
            if client:
                optimizer = DistOrthogonal(groups, **OPTIONS)
                engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config(stage))
            else:
                named = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
                engine, *_ = deepspeed.initialize(model=module, model_parameters=named, config=config(stage))
            before = weights(module)
            steps(engine, 0, 2)
            after = weights(module)
            found.append({name: float((after[name] - before[name]).norm()) for name in before})
        assert found[0] == found[1]
        return found[0]

    (moved, _) = run_ranks(2, run)
    assert moved["up.weight"] < 0.05 * moved["middle.weight"]
    assert moved["lm_head.weight"] < 0.05 * moved["embed_tokens.weight"]


def algorithms(grouping: Grouping) -> dict[str, str]:
    return {a.name: a.algorithm for a in grouping}


@pytest.mark.parametrize("zero_init", [False, True])
def test_names_are_known_on_every_route(zero_init: bool) -> None:
    def run(rank: int) -> None:
        expected = algorithms(DistMuon(model().named_parameters()).grouping())
        settings = config(3)
        without = {key: value for key, value in settings.items() if key != "optimizer"}

        def engine(settings: dict[str, Any], make: Callable[[nn.Module], Any] | None = None) -> Any:
            with deepspeed.zero.Init(enabled=zero_init, config_dict_or_path=settings):
                module = model()
            optimizer = make(module) if make else None
            return deepspeed.initialize(
                model=module, model_parameters=module.parameters(), optimizer=optimizer, config=settings
            )[0]

        routes = {
            "json": engine(settings),
            "callable": engine(without, lambda module: lambda parameters: DistOrthogonal(parameters, **OPTIONS)),
            "object": engine(without, lambda module: DistOrthogonal(module.named_parameters(), **OPTIONS)),
        }
        for route, found in routes.items():
            assert algorithms(found.basic_optimizer.grouping()) == expected, route

    run_ranks(1, run)


def test_unknown_names_are_told() -> None:
    with pytest.warns(UserWarning, match="names of the parameters are not known"):
        DistOrthogonal(model().parameters())
    first, *others = model().parameters()
    with pytest.warns(UserWarning, match="names of the parameters are not known"):
        DistOrthogonal([{"params": [first]}, {"params": others}])


def test_experts_of_one_name_on_different_ranks_are_not_taken_for_replicas() -> None:
    """DeepSpeed's MoE layers at stage 0: experts that lie apart train as experts that every rank has."""

    def losses(experts_apart: int) -> Callable[[int], list[float]]:
        def run(rank: int) -> list[float]:
            torch.manual_seed(0)
            experts = [nn.Linear(8, 8) for _ in range(2)]
            torch.manual_seed(1)
            layer = MoE(
                8, nn.Linear(8, 8), num_experts=2, ep_size=experts_apart, k=1, capacity_factor=2.0, min_capacity=0
            )
            held = experts if experts_apart == 1 else [experts[rank]]
            for ours, theirs in zip(layer.deepspeed_moe.experts.deepspeed_experts, held, strict=True):
                ours.load_state_dict(theirs.state_dict())
            engine, *_ = deepspeed.initialize(model=layer, model_parameters=layer.parameters(), config=config(0))
            found = []
            for step in range(4):
                x = torch.randn(16, 8, generator=torch.Generator().manual_seed(2 * step + rank))
                for _ in range(MICRO_BATCHES):
                    loss = (engine(x)[0] - x.roll(1, 1)).square().mean()
                    engine.backward(loss)
                    engine.step()
                found.append(loss.item())
            return found

        return run

    for apart, together in zip(run_ranks(2, losses(2)), run_ranks(2, losses(1)), strict=True):
        assert apart == pytest.approx(together, rel=4e-4)


@pytest.mark.parametrize(
    ("stage", "state", "precision"),
    [
        (0, "linear8", {}),
        (0, "linear8", BF16),
        (2, "linear8", {}),
        (3, "linear8", {}),
        (3, "linear8", BF16),
        (0, "lowrank4", {}),
        (2, "lowrank4", {}),
        (3, "grasp4", {}),
    ],
)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(
    stage: int, state: str, precision: dict[str, Any], tmp_path: Path
) -> None:
    options = {**OPTIONS, "momentum_state": state, "adamw_state": "dynamic8"}

    def run(rank: int) -> None:
        changes: dict[str, Any] = {"optimizer": {"type": "DistMuon", "params": options}, **precision}
        _, engine = train(stage, 3, **changes)
        engine.save_checkpoint(tmp_path, tag="third")
        steps(engine, 3, 6)
        expected = weights(engine.module)
        _, resumed = train(stage, 0, **changes)
        resumed.load_checkpoint(tmp_path, tag="third")
        steps(resumed, 3, 6)
        for name, found in weights(resumed.module).items():
            assert torch.equal(found, expected[name]), name

    run_ranks(2, run)


def test_a_checkpoint_of_another_codec_is_refused(tmp_path: Path) -> None:
    def run(rank: int) -> None:
        _, engine = train(2, 1)
        engine.save_checkpoint(tmp_path, tag="first")
        other: dict[str, Any] = {"optimizer": {"type": "DistMuon", "params": {**OPTIONS, "momentum_state": "linear8"}}}
        _, resumed = train(2, 0, **other)
        with pytest.raises(ValueError, match="momentum_state"):
            resumed.load_checkpoint(tmp_path, tag="first")

    run_ranks(2, run)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_deepspeed_does_not_orthogonalise_on_its_own(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where its tags are set, as its own Muon sets them."""

    def run(rank: int) -> dict[str, Tensor]:
        from deepspeed.runtime.zero.muon import original_muon

        def never(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("DeepSpeed's Muon was called")

        monkeypatch.setattr(original_muon, "muon_update", never)
        module = model()
        for name, p in module.named_parameters():
            p.use_muon = p.ndim == 2 and "embed" not in name and "lm_head" not in name  # type: ignore[attr-defined]
        engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config(stage))
        steps(engine, 0, 4)
        return weights(module)

    require_alike(run_ranks(2, run), fsdp2(2, 4), 1e-5)


@pytest.mark.parametrize(("state", "most"), [("linear8", 1.02), ("lowrank4", 0.66)])
@pytest.mark.parametrize(("stage", "ranks"), [(2, 2), (2, 4), (3, 2), (3, 4)])
def test_state_costs_what_it_says(stage: int, ranks: int, state: str, most: float) -> None:
    def run(rank: int) -> tuple[int, int, int]:
        torch.manual_seed(0)
        module = nn.Sequential(*(nn.Linear(96, 200, bias=False) for _ in range(8)))
        optimizer = {"type": "DistMuon", "params": {"momentum_state": state}}
        settings = config(stage, train_micro_batch_size_per_gpu=1, optimizer=optimizer)
        engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=settings)
        engine.basic_optimizer.state_dict() if stage < 3 else engine.optimizer.state_dict()
        (flat,) = engine.basic_optimizer.state
        return measured_state_bytes(engine.basic_optimizer), flat.numel(), sum(p.ndim for p in module.parameters())

    for bytes_, held, _ in run_ranks(ranks, run):
        assert bytes_ <= most * held
