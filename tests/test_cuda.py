"""On a GPU: several NCCL ranks on one device equal the single process, nothing waits on the host, memory is bounded."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from muon_dist import DistMuon
from muon_dist.checkpoint import async_save, load_state, save_state
from muon_dist.memory import measured_state_bytes
from muon_dist.options import Polar, PolarForm
from muon_dist.polar import polar_factor, schedule
from muon_dist.sharding import local

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SHAPES = {
    "a.weight": (512, 512),
    "b.weight": (1024, 384),
    "c.weight": (250, 770),
    "d.weight": (3, 64),
    "e.weight": (512, 512),
    "f.weight": (1280, 512),
    "embed_tokens.weight": (1000, 256),
    "norm.weight": (256,),
}
STEPS = 4


def values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).cuda() for name, shape in SHAPES.items()}


def train(sharded: bool, offloaded: bool = False, early: bool = False, **options: Any) -> dict[str, Tensor]:
    mesh = init_device_mesh("cuda", (dist.get_world_size(),)) if sharded else None

    def place(tensor: Tensor) -> Tensor:
        placed = tensor if mesh is None else distribute_tensor(tensor, mesh, [Shard(0)])
        return placed.cpu() if offloaded else placed  # as FSDP2's CPUOffloadPolicy does

    parameters = {name: nn.Parameter(place(value)) for name, value in values(0).items()}
    optimizer = DistMuon(list(parameters.items()), chunk_bytes=1 << 20, **options)
    for step in range(STEPS):
        gradients = {name: place(gradient) for name, gradient in values(1 + step).items()}
        if early:
            loss = sum((on_rank(p) * local(gradients[name])).sum() for name, p in parameters.items())
            assert isinstance(loss, Tensor)
            with optimizer.during_backward(free_gradients=True):
                loss.backward()
        else:
            for name, gradient in gradients.items():
                parameters[name].grad = gradient
        optimizer.step()
        if options.get("offload_momentum"):
            optimizer.load_state_dict(optimizer.state_dict())
            assert is_pinned(optimizer, parameters["a.weight"])
    return {n: whole(p.detach()).cpu() for n, p in parameters.items()}


def is_pinned(optimizer: DistMuon, parameter: Tensor) -> bool:
    """Whether all of this rank's state of a parameter lies in page-locked memory of the host."""
    return all(local(buffer).is_pinned() for buffer in optimizer.state[parameter].values())


def on_rank(parameter: Tensor) -> Tensor:
    """Its part on this rank, as autograd sees it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def whole(tensor: Tensor) -> Tensor:
    on_gpu = tensor.cuda()
    return on_gpu.full_tensor() if isinstance(on_gpu, DTensor) else on_gpu


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("state", "wire", "place"),
    [
        ("fp32", "fp32", ""),
        ("linear8", "bf16", ""),
        ("linear8", "bf16", "offloaded"),
        ("linear8", "bf16", "momentum offloaded"),
        ("linear8", "bf16", "early"),
    ],
)
def test_nccl_ranks_equal_the_single_process(ranks: int, state: str, wire: str, place: str, tmp_path: Path) -> None:
    """Each rank takes another host's name, so that NCCL lets them share the device."""
    jobs = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.test_cuda", state, wire, place, str(tmp_path / f"{rank}.pkl")],
            env={
                **os.environ,
                "NCCL_HOSTID": f"host{rank}",
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "NCCL_SOCKET_IFNAME": "lo",
                "STORE": str(tmp_path / "store"),
            },
            cwd=Path(__file__).parent.parent,
        )
        for rank in range(ranks)
    ]
    assert [job.wait(timeout=300) for job in jobs] == [0] * ranks
    single = train(sharded=False, momentum_state=state, wire=wire)
    start = {name: value.cpu() for name, value in values(0).items()}
    for rank in range(ranks):
        found = pickle.loads((tmp_path / f"{rank}.pkl").read_bytes())
        for name, weight in found.items():
            # cuBLAS picks other kernels for other batch sizes: equal to the rounding of fp16 arithmetic.
            error = float((weight - single[name]).norm() / (single[name] - start[name]).norm())
            assert error < 5e-3, (rank, name, error)


@pytest.mark.parametrize(
    ("table", "form"), [("doubling", "auto"), ("polar_express", "standard"), ("polar_express", "gram")]
)
@pytest.mark.parametrize("shape", [(4, 2048, 2048), (2, 2048, 5504), (2, 5504, 2048)])
def test_large_polar_factors_are_those_of_fp32(table: Polar, form: PolarForm, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape, device="cuda")
    steps = schedule(table)
    exact = polar_factor(matrices, steps, form="auto" if table == "doubling" else "standard", dtype=torch.float32)
    found = polar_factor(matrices, steps, form=form)
    assert found.dtype == torch.float16
    assert float((found.float() - exact).norm() / exact.norm()) < 0.02


def test_a_matrix_cut_out_of_another_has_its_own_polar_factor() -> None:
    torch.manual_seed(0)
    cut = torch.randn(2, 300, 500, device="cuda")[:, 10:266, 20:420]
    steps = schedule("doubling")
    assert torch.equal(polar_factor(cut, steps), polar_factor(cut.contiguous(), steps))


def test_nothing_but_state_is_kept_between_steps() -> None:
    parameters = [(f"{i}.weight", nn.Parameter(torch.randn(1024, 1024, device="cuda"))) for i in range(8)]
    for _, p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = DistMuon(parameters, chunk_bytes=4 << 20)
    polar_factor(torch.eye(1024, device="cuda")[None], schedule("polar_express", 1))  # cuBLAS keeps a workspace
    given = torch.cuda.memory_allocated()
    for _ in range(2):
        optimizer.step()
    assert torch.cuda.memory_allocated() - given <= measured_state_bytes(optimizer) + (1 << 16)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
@pytest.mark.parametrize("momentum_state", ["linear8", "lowrank4"])
def test_a_step_never_waits_for_the_device(momentum_state: Any, nonfinite: Any, offload: bool) -> None:
    parameters = {name: nn.Parameter(value) for name, value in values(0).items()}
    optimizer = DistMuon(
        list(parameters.items()),
        chunk_bytes=1 << 20,
        adamw_state="dynamic8",
        momentum_state=momentum_state,
        nonfinite=nonfinite,
        offload_momentum=offload,
    )
    for name, gradient in values(1).items():
        parameters[name].grad = gradient
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_can_be_captured_in_a_graph() -> None:
    weights = []
    for captured in (False, True):
        parameters = {name: nn.Parameter(value) for name, value in values(0).items()}
        optimizer = DistMuon(list(parameters.items()), chunk_bytes=1 << 20)
        for name, gradient in values(1).items():
            parameters[name].grad = gradient
        optimizer.step()  # makes the state
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for seed in (2, 3):
            for name, gradient in values(seed).items():
                gradient_of(parameters[name]).copy_(gradient)
            graph.replay() if captured else optimizer.step()
        weights.append([p.detach() for p in parameters.values()])
    assert all(torch.equal(replayed, plain) for replayed, plain in zip(*weights, strict=True))


def gradient_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("frees", [False, True])
@pytest.mark.parametrize("momentum_state", ["linear8", "lowrank4"])
def test_a_step_that_begins_during_the_backward_pass_is_the_same_bits_and_waits_for_nothing(
    momentum_state: Any, frees: bool
) -> None:
    weights = []
    for early in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(12))).cuda()
        options = {"chunk_bytes": 2 << 20, "momentum_state": momentum_state}
        optimizer = DistMuon(model.named_parameters(), **options)
        for step in range(5):
            loss = model(torch.full((64, 512), 1.0 + step, device="cuda")).square().sum()
            with optimizer.during_backward(free_gradients=frees) if early else nullcontext():
                torch.cuda.set_sync_debug_mode("error" if step else "default")
                loss.backward()
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
            assert all((p.grad is None) == (early and frees) for p in model.parameters())
            optimizer.zero_grad()
        weights.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(ours, plain) for ours, plain in zip(*weights, strict=True))


@pytest.mark.parametrize("momentum_state", ["fp32", "linear8", "dynamic8", "nf4", "grasp4", "lowrank4"])
def test_offloaded_momentum_trains_to_the_same_bits_and_stays_on_the_host(momentum_state: Any, tmp_path: Path) -> None:
    """Through steps, and what loads a state: a portable one that was saved from the GPU, too."""

    def train_and_load(offload: bool) -> list[Tensor]:
        parameters = {name: nn.Parameter(value) for name, value in values(0).items()}
        optimizer = DistMuon(
            list(parameters.items()), chunk_bytes=1 << 20, momentum_state=momentum_state, offload_momentum=offload
        )

        def step(seed: int) -> None:
            for name, gradient in values(seed).items():
                parameters[name].grad = gradient
            optimizer.step()
            assert is_pinned(optimizer, parameters["a.weight"]) == offload

        step(1)
        step(2)
        save_state(optimizer, tmp_path / f"offloaded {offload}")
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        step(3)
        assert not load_state(optimizer, tmp_path / "offloaded False").encoded
        optimizer.observer.observing = True
        step(4)
        optimizer.load_state_dict(optimizer.state_dict())
        step(5)
        state = [buffer.cpu() for buffer in optimizer.state_dict()["state"][0].values()]
        return [*(p.detach() for p in parameters.values()), *optimizer.observer.latest.values(), *state]

    for ours, theirs in zip(train_and_load(False), train_and_load(True), strict=True):
        assert torch.equal(ours, theirs)


def test_offloaded_momentum_comes_back_from_where_a_trainer_took_it() -> None:
    """Lightning takes all state to the device after it has loaded it."""
    weights = []
    for moved in (False, True):
        parameters = {name: nn.Parameter(value) for name, value in values(0).items()}
        optimizer = DistMuon(list(parameters.items()), momentum_state="lowrank4", offload_momentum=True)
        for seed in (1, 2):
            for name, gradient in values(seed).items():
                parameters[name].grad = gradient
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            if moved:
                for p, entries in optimizer.state.items():
                    optimizer.state[p] = {key: value.cuda() for key, value in entries.items()}
        optimizer.state_dict()
        assert is_pinned(optimizer, parameters["a.weight"])
        weights.append([p.detach() for p in parameters.values()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("momentum_state", ["linear8", "lowrank4"])
def test_a_skipped_step_leaves_offloaded_momentum_as_it_is(momentum_state: Any) -> None:
    parameters = {name: nn.Parameter(value) for name, value in values(0).items()}
    optimizer = DistMuon(
        list(parameters.items()), momentum_state=momentum_state, nonfinite="skip", offload_momentum=True
    )

    def state_after_a_step(factor: float) -> list[Tensor]:
        for name, gradient in values(1).items():
            parameters[name].grad = gradient * factor
        optimizer.step()
        return [t.clone() for entries in optimizer.state_dict()["state"].values() for t in entries.values()]

    before = state_after_a_step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(state_after_a_step(float("inf")), before, strict=True))


def test_grad_scaler_finds_its_scale_in_fp16_and_overflows_leave_no_trace() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)).cuda()
    optimizer = DistMuon(model.named_parameters())
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    inputs, skipped = torch.randn(256, 64, device="cuda"), 0
    for _ in range(40):
        before, scale = [p.detach().clone() for p in model.parameters()], scaler.get_scale()
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            outputs = model(inputs)
        scaler.scale(outputs.float().square().mean()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        overflowed = scaler.get_scale() < scale
        skipped += overflowed
        assert overflowed == all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert 0 < skipped < 40
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("offload", [False, True])
def test_a_save_in_the_background_has_the_state_of_its_moment(offload: bool, tmp_path: Path) -> None:
    parameters = {name: nn.Parameter(value) for name, value in values(0).items()}
    optimizer = DistMuon(list(parameters.items()), adamw_state="dynamic8", offload_momentum=offload)

    def state_after_a_step(seed: int) -> list[Tensor]:
        for name, gradient in values(seed).items():
            parameters[name].grad = gradient
        optimizer.step()
        return [t.clone() for entries in optimizer.state_dict()["state"].values() for t in entries.values()]

    before = state_after_a_step(1)
    saving = async_save(optimizer, tmp_path / "state")
    assert not all(torch.equal(a, b) for a, b in zip(state_after_a_step(2), before, strict=True))
    saving.result()
    load_state(optimizer, tmp_path / "state")
    loaded = [t for entries in optimizer.state_dict()["state"].values() for t in entries.values()]
    assert all(torch.equal(a, b) for a, b in zip(loaded, before, strict=True))


def test_the_memory_of_a_step_does_not_grow_with_the_model() -> None:
    def extra(layers: int) -> int:
        parameters = [(f"{i}.weight", nn.Parameter(torch.randn(1024, 1024, device="cuda"))) for i in range(layers)]
        optimizer = DistMuon(parameters, chunk_bytes=8 << 20)
        for _, p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        return torch.cuda.max_memory_allocated() - before

    assert extra(48) <= extra(12) * 1.05


def _run_rank(state: str, wire: str, place: str, out: str) -> None:
    torch.cuda.set_device(0)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("nccl", init_method=f"file://{os.environ['STORE']}", rank=rank, world_size=ranks)
    weights = train(
        sharded=True,
        offloaded=place == "offloaded",
        early=place == "early",
        offload_momentum=place == "momentum offloaded",
        momentum_state=state,
        wire=wire,
    )
    Path(out).write_bytes(pickle.dumps(weights))
    dist.destroy_process_group()


if __name__ == "__main__":
    _run_rank(*sys.argv[1:])
