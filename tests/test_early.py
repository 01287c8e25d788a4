"""A step that begins during the backward pass is the plain step, bit for bit, and has really begun; misuse is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from muon_dist import DistMuon
from muon_dist.exchange import Exchange
from muon_dist.sharding import local
from tests.ranks import run_ranks

CHUNK_BYTES = 16 * 16 * 4  # one of the matrices below on each owner
LAYERS = 10


class Network(nn.Module):
    """Layers of one shape, one that is not trained and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.unused = nn.Linear(16, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(LAYERS))
        self.lm_head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.lm_head(x)


def network(engine: str) -> nn.Module:
    torch.manual_seed(0)
    model = Network()
    if engine != "single":
        replicated = engine == "HSDP"
        mesh = (
            init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "s")) if replicated else init_device_mesh("cpu", (2,))
        )
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def optimizer_of(model: nn.Module, **options: Any) -> DistMuon:
    return DistMuon(model.named_parameters(), chunk_bytes=CHUNK_BYTES, wire="fp32", **options)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * seed + (dist.get_rank() if dist.is_initialized() else 0))
    return model(torch.randn(4, 16, generator=generator)).square().mean()


@contextmanager
def recorded(events: list[str]) -> Iterator[None]:
    """Has ``events`` tell when chunks are sent."""
    gather = Exchange.gather

    def record(exchange: Exchange, *arguments: Any) -> Any:
        events.append("sent")
        return gather(exchange, *arguments)

    with patch.object(Exchange, "gather", record):
        yield


def train(engine: str, early: bool, frees: bool = False) -> tuple[list[Tensor], list[str]]:
    """Weights, state and statistics after some steps of two micro-batches; and the events of the last backward pass."""
    model = network(engine)
    optimizer = optimizer_of(model, weight_decay=0.1, momentum_state="lowrank4")
    events: list[str] = []
    for step in range(4):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(False)
        loss_of(model, 2 * step).backward()
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(True)
        optimizer.observer.observing = step == 3
        loss = loss_of(model, 2 * step + 1)
        events.clear()
        first = model.get_parameter("layers.0.weight")
        hook = first.register_post_accumulate_grad_hook(lambda _: events.append("first layer"))
        begun = optimizer.during_backward(free_gradients=frees) if early else nullcontext()
        with recorded(events), torch.autocast("cpu"), begun:  # autocast is none of the optimizer's business
            loss.backward()
        hook.remove()
        if frees and step:
            assert model.get_parameter(f"layers.{LAYERS - 1}.weight").grad is None
            assert first.grad is not None
        for group in optimizer.param_groups:
            group["lr"] /= 2  # is read in step()
        optimizer.step()
        if frees:
            assert all(p.grad is None for p in model.parameters())
        optimizer.zero_grad()
    state = [t for entries in optimizer.state.values() for t in entries.values()]
    return [local(t).detach() for t in (*model.parameters(), *state, *optimizer.observer.latest.values())], events


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("FSDP2", 2), ("HSDP", 4)])
def test_it_is_the_plain_step_bit_for_bit_and_sends_chunks_before_the_backward_pass_is_done(
    engine: str, ranks: int
) -> None:
    def check(rank: int) -> None:
        plain, events = train(engine, early=False)
        assert events == ["first layer"]
        for frees in (False, True):
            ours, events = train(engine, early=True, frees=frees)
            assert events == ["sent", "sent", "first layer"]
            for ours_of, plain_of in zip(ours, plain, strict=True):
                assert torch.equal(ours_of, plain_of)

    run_ranks(ranks, check) if ranks > 1 else check(0)


Parameters = dict[str, nn.Parameter]


def matrices() -> Parameters:
    """On two ranks, in one chunk each."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2,))
    return {f"{i}.weight": nn.Parameter(distribute_tensor(torch.randn(32, 16), mesh, [Shard(0)])) for i in range(5)}


def backward(parameters: Parameters, names: list[str], seed: int) -> None:
    """Gradients of ``names``, which come in the opposite order."""
    generator = torch.Generator().manual_seed(seed)
    factors = {name: torch.randn(16, 16, generator=generator) for name in parameters}
    loss = torch.zeros((), requires_grad=True)
    for name in names:
        p = parameters[name]
        assert isinstance(p, DTensor)
        loss = loss + (p.to_local() * factors[name]).sum()
    loss.backward()


def test_ranks_whose_gradients_come_in_another_order_or_not_at_all_stay_together() -> None:
    def check(rank: int) -> None:
        def train(early: bool) -> list[Tensor]:
            parameters = matrices()
            optimizer = optimizer_of_matrices(parameters)
            for step in range(4):
                names = list(parameters)[:: 1 - 2 * rank]
                names.remove(f"{(step + 2 * rank) % 5}.weight")  # one of each rank's own is missing
                with optimizer.during_backward() if early else nullcontext():
                    backward(parameters, names, step)
                optimizer.step()
                optimizer.zero_grad()
            return [local(p).detach() for p in parameters.values()]

        assert all(torch.equal(ours, plain) for ours, plain in zip(train(True), train(False), strict=True))

    run_ranks(2, check)


def optimizer_of_matrices(parameters: Parameters) -> DistMuon:
    return DistMuon(list(parameters.items()), chunk_bytes=32 * 16 * 2, wire="fp32")


def test_a_pass_that_raises_is_given_up_wherever_ranks_had_come_to() -> None:
    """Ranks that had sent different chunks go on together, with a plain step or another pass."""

    def check(rank: int) -> None:
        def fail(_: Tensor) -> None:
            raise ZeroDivisionError

        parameters = matrices()
        optimizer = optimizer_of_matrices(parameters)
        names = list(parameters)
        backward(parameters, names, seed=2)
        optimizer.step()  # nothing begins early in the first step
        optimizer.zero_grad()
        for in_backward in (True, False):
            before = [local(p).detach().clone() for p in parameters.values()]
            events: list[str] = []
            hook = parameters[f"{4 - 4 * rank}.weight"].register_post_accumulate_grad_hook(fail)
            with pytest.raises(ZeroDivisionError), recorded(events), optimizer.during_backward():
                backward(parameters, names, seed=0)
            hook.remove()
            assert len(events) == 2 * rank
            optimizer.state_dict()
            assert all(torch.equal(local(p), b) for p, b in zip(parameters.values(), before, strict=True))
            optimizer.zero_grad()
            with optimizer.during_backward() if in_backward else nullcontext():
                backward(parameters, names, seed=1)
            optimizer.step()
            optimizer.zero_grad()
            assert all(torch.isfinite(local(p)).all() for p in parameters.values())
            assert not any(torch.equal(local(p), b) for p, b in zip(parameters.values(), before, strict=True))

    run_ranks(2, check)


def clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def another_pass(model: nn.Module) -> None:
    loss_of(model, 7).backward()


def two_passes(model: nn.Module) -> None:
    another_pass(model)
    another_pass(model)


def other_gradients(model: nn.Module) -> None:
    model.zero_grad()
    loss_of(model, 7).backward()


def two_steps(optimizer: DistMuon) -> None:
    for _ in range(2):
        optimizer.step()


@pytest.mark.parametrize("change", [clip, another_pass, other_gradients])
@pytest.mark.parametrize("engine", ["single", "FSDP2"])
def test_gradients_that_are_changed_before_the_step_raise_by_name(
    engine: str, change: Callable[[nn.Module], None]
) -> None:
    """At once where the host sees it, else at the next step."""

    def check(rank: int) -> None:
        model = network(engine)
        optimizer = optimizer_of(model)
        optimizer.step()
        with optimizer.during_backward():
            loss_of(model, 0).backward()
        change(model)
        with pytest.raises(RuntimeError, match=r"gradients of layers.9.weight, .*layers.\d.weight were changed after"):
            two_steps(optimizer)
        optimizer.step()

    run_ranks(2, check) if engine == "FSDP2" else check(0)


def test_gradients_that_are_left_alone_raise_nothing_whatever_they_hold() -> None:
    model = network("single")
    optimizer = optimizer_of(model, momentum_state="fp32")
    for _ in range(4):
        with optimizer.during_backward():
            (loss_of(model, 0) * float("nan")).backward()
        nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        optimizer.step()


def test_misuse_is_told() -> None:
    model = network("single")
    optimizer = optimizer_of(model)
    optimizer.step()

    def begin() -> None:
        with optimizer.during_backward():
            loss_of(model, 0).backward()

    with pytest.raises(RuntimeError, match=r"step\(\) inside of during_backward"), optimizer.during_backward():
        optimizer.step()
    with pytest.raises(RuntimeError, match="inside of during_backward"), optimizer.during_backward():
        begin()
    with pytest.raises(RuntimeError, match=r"9.weight came in parts.*two backward passes"), optimizer.during_backward():
        two_passes(model)
    begin()
    with pytest.raises(RuntimeError, match=r"state_dict\(\) between during_backward\(\) and step\(\)"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match=r"step\(\) was not called after the last during_backward"):
        begin()
    begin()
    model.unused.requires_grad_(False)
    with pytest.raises(RuntimeError, match="frozen or added between"):
        optimizer.step()
    optimizer.step()
    with pytest.raises(ValueError, match=r"nonfinite='skip' judges all gradients"):
        optimizer_of(model, nonfinite="skip").during_backward()


def test_replicas_of_plain_tensors_are_refused_by_name() -> None:
    def check(rank: int) -> None:
        with pytest.raises(ValueError, match=r"frozen|unused.weight is a plain tensor on 2 ranks.*DistributedDataPar"):
            optimizer_of(network("single")).during_backward()

    run_ranks(2, check)
