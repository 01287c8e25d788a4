"""Large jobs: connecting to many ranks; bytes counted against their formulas; plans alike on all ranks."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import muon_dist.muon
from muon_dist import DistMuon
from muon_dist.options import Wire
from muon_dist.plan import Plan
from tests.ranks import run_ranks
from tests.test_sharded import LAYOUTS

LAYER = [(64, 64), (16, 64), (16, 64), (64, 64), (224, 64), (224, 64), (64, 224)]


def test_a_rank_of_1024_connects_to_two_thousand_matrices_in_seconds() -> None:
    """About 1 s. A walk over ranks times matrices would be 80 s."""

    def seconds(_: int) -> float:
        dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=1024)
        mesh = init_device_mesh("cpu", (1024,))

        def shard(rows: int, cols: int) -> nn.Parameter:
            size, stride = torch.Size((16 * rows, cols)), (cols, 1)
            part = torch.zeros(-(-size[0] // 1024), cols)
            return nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=size, stride=stride))

        parameters = [(f"{i}.weight", shard(*LAYER[i % len(LAYER)])) for i in range(2000)]
        optimizer = DistMuon(parameters)
        started = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - started

    assert run_ranks(1, seconds)[0] < 20


MATRICES = 8  # alike, so that their owners have equally much to send
SIDE = 256
ELEMENTS = MATRICES * SIDE**2
BYTES: dict[Wire, float] = {"fp32": 4.0, "bf16": 2.0, "int8": 1 + 2 / 128}  # an element


@pytest.mark.parametrize("wire", BYTES)
@pytest.mark.parametrize(
    ("name", "shards", "replicas"), [("fsdp x2", 2, 1), ("fsdp x4", 4, 1), ("hsdp 2x2", 2, 2), ("ddp x2", 1, 2)]
)
def test_bytes_counted_are_the_formulas(name: str, shards: int, replicas: int, wire: Wire) -> None:
    """To the owners and back b (P / W) (W - 1) / W each, W all ranks; then b (P / shards) (R - 1) / R to replicas.
    Every matrix is orthogonalised once in the job, by plans that are the same on all ranks."""
    ranks, make_layout = LAYOUTS[name]

    def step(rank: int) -> tuple[list[int], int, list[Plan]]:
        sent: list[int] = []
        orthogonalised = 0
        all_to_all, polar_factor = dist.all_to_all_single, muon_dist.muon.polar_factor

        def counted(received: Tensor, given: Tensor, out_splits: Any, in_splits: list[int], **options: Any) -> Any:
            sent.append(sum(n for peer, n in enumerate(in_splits) if peer != rank))
            return all_to_all(received, given, out_splits, in_splits, **options)

        def counting(matrices: Tensor, *arguments: Any, **options: Any) -> Tensor:
            nonlocal orthogonalised
            orthogonalised += len(matrices)
            return polar_factor(matrices, *arguments, **options)

        setattr(dist, "all_to_all_single", counted)  # noqa: B010 - of another signature
        setattr(muon_dist.muon, "polar_factor", counting)  # noqa: B010
        layout = make_layout()
        parameters = {f"{i}.weight": nn.Parameter(layout(torch.randn(SIDE, SIDE))) for i in range(MATRICES)}
        for p in parameters.values():
            p.grad = layout(torch.randn(SIDE, SIDE))
        optimizer = DistMuon(parameters.items(), wire=wire)
        optimizer.step()
        return sent, orthogonalised, optimizer.plans

    results = run_ranks(ranks, step)
    to_owners = BYTES[wire] * ELEMENTS / ranks * (ranks - 1) / ranks
    to_replicas = BYTES[wire] * ELEMENTS / shards * (replicas - 1) / replicas
    for sent, _, plans in results:
        assert sent == [to_owners, to_owners, *([to_replicas] if replicas > 1 else [])]
        assert plans == results[0][2]
    assert sum(orthogonalised for _, orthogonalised, _ in results) == MATRICES
