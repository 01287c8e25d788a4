"""DeepSpeed on a GPU that two NCCL ranks share: offload computes there, fp16's overflowing steps leave no trace."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from muon_dist import DistMuon

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

RANKS, STEPS = 2, 6
OPTIONS: dict[str, Any] = {
    "lr": 1e-2,
    "adamw_lr": 1e-3,
    "momentum_state": "fp32",
    "wire": "fp32",
    "polar": "polar_express",
    "polar_dtype": "float32",
}
MOMENTUM_OFFLOADED = {"type": "DistMuon", "params": {**OPTIONS, "offload_momentum": True}}
OFFLOAD = {"device": "cpu", "pin_memory": True}
CASES: dict[str, dict[str, Any]] = {
    "zero 2": {"zero_optimization": {"stage": 2}},
    "zero 3": {"zero_optimization": {"stage": 3}},
    "zero 2, offload": {"zero_optimization": {"stage": 2, "offload_optimizer": OFFLOAD}},
    "zero 3, offload": {"zero_optimization": {"stage": 3, "offload_optimizer": OFFLOAD, "sub_group_size": 50_000}},
    "zero 2, momentum offloaded": {"zero_optimization": {"stage": 2}, "optimizer": MOMENTUM_OFFLOADED},
    "zero 3, momentum offloaded": {"zero_optimization": {"stage": 3}, "optimizer": MOMENTUM_OFFLOADED},
    "zero 0": {"zero_optimization": {"stage": 0}},
}
# The first gradients overflow at this scale, and it is halved until they do not.
FP16 = {"enabled": True, "initial_scale_power": 30, "hysteresis": 1}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(130, 250), nn.ReLU(), nn.Linear(250, 333), nn.ReLU(), nn.Linear(333, 10)).cuda()


def loss(module: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of this rank's half of the batch, or all of it in a single process."""
    generator = torch.Generator().manual_seed(step)
    inputs, labels = torch.randn(64, 130, generator=generator), torch.randint(10, (64,), generator=generator)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    x, y = inputs.chunk(ranks)[rank].cuda(), labels.chunk(ranks)[rank].cuda()
    return functional.cross_entropy(module(x.to(dtype)).float(), y)


def weights(module: nn.Module) -> list[Tensor]:
    import deepspeed

    found = []
    for p in module.parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            found.append(p.detach().float().cpu().clone())
    return found


def everything(engine: Any) -> list[Tensor]:
    """Weights and state as they are now."""
    state = [value.clone() for entries in engine.basic_optimizer.state.values() for value in entries.values()]
    return [*weights(engine.module), *state]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank of one job found in all cases."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("job")
    base = {**os.environ, "WORLD_SIZE": str(RANKS), "LOCAL_RANK": "0", "NCCL_SOCKET_IFNAME": "lo"}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integrations.test_deepspeed_cuda", str(folder)],
            # Each rank takes another host's name, so that NCCL lets them share the device.
            env={**base, "RANK": str(rank), "NCCL_HOSTID": f"host{rank}"},
            cwd=Path(__file__).parent.parent.parent,
        )
        for rank in range(RANKS)
    ]
    assert [job.wait(timeout=400) for job in jobs] == [0] * RANKS
    return [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_zero_trains_as_a_single_process(case: str, found: list[dict[str, Any]]) -> None:
    module = model()
    start = [p.detach().cpu().clone() for p in module.parameters()]
    optimizer = DistMuon(list(module.named_parameters()), **{**OPTIONS, "polar_dtype": torch.float32})
    for step in range(STEPS):
        loss(module, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    for rank in found:
        for ours, p, before in zip(rank[case], module.parameters(), start, strict=True):
            theirs = p.detach().cpu()
            assert float((ours - theirs).norm() / (theirs - before).norm()) < 5e-3


@pytest.mark.parametrize("stage", [2, 3])
def test_an_overflow_in_fp16_skips_the_step(stage: int, found: list[dict[str, Any]]) -> None:
    for rank in found:
        result = rank[f"fp16 zero {stage}"]
        assert 0 < result["skipped"] < result["steps"]
        assert not result["changed by skipped steps"]
        assert result["losses"][-1] < result["losses"][0]


def _train(changes: dict[str, Any]) -> Any:
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 32,
        "optimizer": {"type": "DistMuon", "params": OPTIONS},
        "steps_per_print": 10**9,
        **changes,
    }
    module = model()
    return deepspeed.initialize(model=module, model_parameters=module.parameters(), config=settings)[0]


def _overflow(stage: int) -> dict[str, Any]:
    engine = _train({"zero_optimization": {"stage": stage}, "fp16": FP16})
    losses, changed, steps = [], False, 40
    for _ in range(steps):
        value = loss(engine, 0, torch.float16)
        losses.append(value.item())
        engine.backward(value)
        before, skipped = everything(engine), engine.skipped_steps
        engine.step()
        if engine.skipped_steps > skipped:
            changed |= not all(torch.equal(a, b) for a, b in zip(before, everything(engine), strict=True))
    return {"losses": losses, "skipped": engine.skipped_steps, "steps": steps, "changed by skipped steps": changed}


def _run_rank(folder: str) -> None:
    import muon_dist.integrations.deepspeed  # noqa: F401 (registers)

    torch.cuda.set_device(0)
    rank = int(os.environ["RANK"])
    dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results: dict[str, Any] = {}
    for name, changes in CASES.items():
        engine = _train(changes)
        for step in range(STEPS):
            engine.backward(loss(engine, step))
            engine.step()
        results[name] = weights(engine.module)
        engine.destroy()
    for stage in (2, 3):
        results[f"fp16 zero {stage}"] = _overflow(stage)
    Path(folder, f"{rank}.pkl").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    _run_rank(sys.argv[1])
