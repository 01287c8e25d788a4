"""Bad input is refused before anything changes, naming the parameter or option and the fix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from muon_dist import DistMuon
from muon_dist.sharding import local
from tests.ranks import run_ranks


def matrix() -> nn.Parameter:
    return nn.Parameter(torch.ones(8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum_state": "int3"}, r"momentum_state='int3'.*'linear8'"),
        ({"adamw_state": "linear8"}, r"adamw_state='linear8'.*'dynamic8'"),
        ({"wire": "fp8"}, r"wire='fp8'.*'bf16'"),
        ({"polar": "newton"}, r"polar='newton'.*'jordan'"),
        ({"polar_steps": 0}, r"polar_steps=0.*positive"),
        ({"polar": "cans", "polar_steps": 9}, r"polar_steps=9.*'cans' has 5"),
        ({"polar_form": "gram"}, r"polar_form='gram'.*'doubling' has one form"),
        ({"polar_dtype": torch.bfloat16}, r"polar_dtype=torch.bfloat16.*torch.float16"),
        ({"polar_form": "fast"}, r"polar_form='fast'.*'gram'"),
        ({"polar_dtype": torch.int8}, r"polar_dtype=torch.int8"),
        ({"block_size": 0}, r"block_size=0.*positive"),
        ({"rank_fraction": 2}, r"rank_fraction=2.*at most 1"),
        ({"chunk_bytes": -1}, r"chunk_bytes=-1.*positive"),
        ({"offload_momentum": "cpu"}, r"offload_momentum='cpu'.*True or False"),
        ({"nonfinite": "ignore"}, r"nonfinite='ignore'.*'raise'"),
        ({"lr": -0.1}, r"lr=-0.1"),
        ({"momentum": 1.0}, r"momentum=1.0.*less than 1"),
        ({"weight_decay": -1}, r"weight_decay=-1"),
        ({"update_scale": "big"}, r"update_scale='big'.*'spectral'"),
        ({"overrides": {"w": "sgd"}}, r"overrides.*'sgd'.*'muon'"),
    ],
)
def test_an_option_names_what_it_can_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistMuon([("w", matrix())], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"adamw_lr": -1}, "lr=-1"), ({"adamw_betas": (0.9, 1.0)}, "betas="), ({"adamw_eps": 0.0}, "eps=0.0")],
)
def test_an_option_of_the_adamw_part_too(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistMuon([("norm.weight", nn.Parameter(torch.ones(8)))], **options)


def test_a_vector_cannot_go_to_muon() -> None:
    vector = nn.Parameter(torch.ones(8))
    with pytest.raises(ValueError, match=r"norm.weight has shape \(8,\).*algorithm=\"adamw\""):
        DistMuon([{"params": [("norm.weight", vector)], "algorithm": "muon"}])
    with pytest.raises(ValueError, match="norm.weight has shape"):
        DistMuon([("norm.weight", vector)], overrides={"norm.*": "muon"})


def test_parameters_that_cannot_be_trained_are_named() -> None:
    with pytest.raises(ValueError, match="codes is torch.int8"):
        DistMuon([("codes", nn.Parameter(torch.ones(8, dtype=torch.int8), requires_grad=False))])
    with pytest.raises(ValueError, match="wide is torch.float64.*float"):
        DistMuon([("wide", nn.Parameter(torch.ones(8, dtype=torch.float64)))])
    with pytest.raises(TypeError, match="parameter 0 is a list"):
        DistMuon([[1.0]])  # type: ignore[arg-type]


def test_duplicates_are_named_within_and_across_groups() -> None:
    p = matrix()
    with pytest.raises(ValueError, match="b is the same tensor as a"):
        DistMuon([("a", p), ("b", p)])
    optimizer = DistMuon([("a", p)])
    with pytest.raises(ValueError, match="b is the same tensor as a of another group"):
        optimizer.add_param_group({"params": [("b", p)]})
    assert len(optimizer.param_groups) == 1


def test_a_misspelt_group_option_is_not_carried_along() -> None:
    with pytest.raises(ValueError, match="'momentm'; did you mean 'momentum'"):
        DistMuon([{"params": [("a", matrix())], "momentm": 0.9}])
    with pytest.raises(ValueError, match="algorithm='sgd'.*'muon'"):
        DistMuon([{"params": [("a", matrix())], "algorithm": "sgd"}])
    assert DistMuon([{"params": [("a", matrix())], "note": 1}]).param_groups[0]["note"] == 1


def test_parameters_on_several_devices_are_named() -> None:
    elsewhere = nn.Parameter(torch.ones(8, 8, device="meta"))
    with pytest.raises(ValueError, match=r"several devices.*'cpu'.*'a'.*'meta'.*'b'.*move them to one"):
        DistMuon([("a", matrix()), ("b", elsewhere)]).step()


def test_unknown_names_are_told() -> None:
    with pytest.warns(UserWarning, match=r"all 1 matrices go to Muon.*named_parameters"):
        DistMuon([matrix()])


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        (lambda rank: {"momentum_state": ["linear8", "fp32"][rank]}, "linear8.*fp32"),
        (lambda rank: {"weight_decay": [0.1, 0.2][rank]}, r"w .*0\.1.*0\.2"),
        (lambda rank: {"chunk_bytes": [1000, 2000][rank]}, "1000.*2000"),
    ],
    ids=["codec", "hyper-parameter", "chunks"],
)
def test_ranks_with_different_optimizers_raise_on_all(difference: Any, message: str) -> None:
    def check(rank: int) -> None:
        p = nn.Parameter(distribute_tensor(torch.ones(8, 8), init_device_mesh("cpu", (2,)), [Shard(0)]))
        p.grad = p.detach().clone()
        with pytest.raises(ValueError, match=f"(?s)different optimizers.*{message}"):
            DistMuon([("w", p)], **difference(rank)).step()

    run_ranks(2, check)


def test_another_order_of_parameters_raises_instead_of_hanging() -> None:
    def check(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        named = [(n, nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)]))) for n in ("a", "b", "c")]
        with pytest.raises(ValueError, match="(?s)same order.*.a .*.c "):
            DistMuon(named[:: 1 - 2 * rank]).step()

    run_ranks(2, check)


@pytest.mark.parametrize("replicas", ["DDP", "HSDP"])
@pytest.mark.parametrize("name", ["a.weight", "norm.weight"])
def test_replicas_with_and_without_a_gradient_raise_on_all_at_the_next_step(name: str, replicas: str) -> None:
    ranks = 2 if replicas == "DDP" else 4

    def check(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2)) if replicas == "HSDP" else None

        def place(tensor: torch.Tensor) -> torch.Tensor:
            return distribute_tensor(tensor, mesh, [Replicate(), Shard(0)]) if mesh else tensor

        shapes = {"a.weight": (8, 8), "b.weight": (8, 4), "norm.weight": (8,)}
        named = {n: nn.Parameter(place(torch.ones(shape))) for n, shape in shapes.items()}
        optimizer = DistMuon(named.items())
        for missing in ({"b.weight"}, set(), {name} if rank == ranks - 1 else set()):
            for n, p in named.items():
                p.grad = None if n in missing else p.detach().clone()
            optimizer.step()
        with pytest.raises(
            ValueError, match=rf"(?s)drifted apart.*reduce gradients.*  {name}: on ranks \[{ranks - 1}\]$"
        ):
            optimizer.step()

    run_ranks(ranks, check)


def test_a_gradient_on_another_mesh_is_refused_before_anything_changes() -> None:
    def check(rank: int) -> None:
        mesh, other = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
        before = distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)])
        p, q = (nn.Parameter(before.clone()) for _ in range(2))
        p.grad = p.detach().clone()
        q.grad = distribute_tensor(torch.ones(8, 8), other, [Shard(0), Shard(0)])
        optimizer = DistMuon([("p", p), ("q", q)])
        with pytest.raises(ValueError, match=r"q lies on DeviceMesh.* but its gradient on DeviceMesh.*same mesh"):
            optimizer.step()
        assert torch.equal(local(p), before.to_local())
        subgroup = dist.new_group([0, 1])
        if rank >= 2:
            with pytest.raises(ValueError, match="this rank is not in process_group"):
                DistMuon([("p", p)], process_group=subgroup)

    run_ranks(4, check)


def test_layouts_that_cannot_be_followed_are_refused_by_name() -> None:
    def check(rank: int) -> None:
        mesh = init_device_mesh("cpu", (4,))
        partial = nn.Parameter(DTensor.from_local(torch.ones(8, 8), mesh, [Partial()]))
        partial.grad = partial.detach().clone()
        with pytest.raises(ValueError, match=r"w: it has the placement Partial\(sum\)"):
            DistMuon([("w", partial)]).step()

    run_ranks(4, check)
