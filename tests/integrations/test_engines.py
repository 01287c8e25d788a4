"""A real transformer, trained by real engines with real gradients, against the single process on the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from muon_dist import DistMuon
from tests.ranks import run_ranks

STEPS = 3


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    # 24 rows over three ranks and 40 over four are even, 44 rows are uneven for both.
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=44,
            hidden_size=24,
            intermediate_size=44,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )


def batch(step: int) -> Tensor:
    return torch.randint(44, (12, 16), generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, rank: int = 0, ranks: int = 1, early: bool = False, **options: Any) -> DistMuon:
    named = model.module.named_parameters() if isinstance(model, DistributedDataParallel) else model.named_parameters()
    optimizer = DistMuon(named, **{"momentum_state": "fp32", "wire": "fp32", **options})
    for step in range(STEPS):
        tokens = batch(step).chunk(ranks)[rank]
        loss = model(input_ids=tokens, labels=tokens).loss
        with optimizer.during_backward() if early else nullcontext():
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def whole_weights(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def shard(model: LlamaForCausalLM, mesh_shape: tuple[int, ...], **options: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def tensor_parallel(model: LlamaForCausalLM, shards: int) -> nn.Module:
    """Heads and hidden units over two ranks; under FSDP2 their rows are cut once more."""
    mesh = init_device_mesh("cpu", (shards, 2), mesh_dim_names=("shard", "tp"))
    for layer in model.model.layers:
        columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        rows = ("self_attn.o_proj", "mlp.down_proj")
        plan = {**dict.fromkeys(columns, ColwiseParallel()), **dict.fromkeys(rows, RowwiseParallel())}
        parallelize_module(layer, mesh["tp"], plan)
        if shards > 1:
            fully_shard(layer, mesh=mesh["shard"])
    if shards > 1:
        fully_shard(model, mesh=mesh["shard"])
    return model


def compiled(model: LlamaForCausalLM) -> nn.Module:
    """Every layer, before it is sharded, and with its activations computed anew in the backward pass."""
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(checkpoint_wrapper(layer), backend="eager")
    return shard(model, (2,))


ENGINES: dict[str, tuple[int, Callable[[LlamaForCausalLM], nn.Module]]] = {
    "fsdp2 x2": (2, lambda model: shard(model, (2,))),
    "fsdp2 x3": (3, lambda model: shard(model, (3,))),
    "fsdp2, cpu offload": (2, lambda model: shard(model, (2,), offload_policy=CPUOffloadPolicy(pin_memory=False))),
    "hsdp 2x2": (4, lambda model: shard(model, (2, 2))),
    "ddp x2": (2, DistributedDataParallel),
    "tensor parallel x2": (2, lambda model: tensor_parallel(model, 1)),
    "tensor parallel 2 x fsdp2 2": (4, lambda model: tensor_parallel(model, 2)),
    "fsdp2, compiled, activation checkpointing": (2, compiled),
}


@pytest.fixture(scope="module")
def reference() -> list[Tensor]:
    model = llama()
    train(model)
    return whole_weights(model)


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_trains_like_a_single_process(name: str, reference: list[Tensor]) -> None:
    ranks, wrap = ENGINES[name]
    start = whole_weights(llama())

    def weights(rank: int) -> list[Tensor]:
        model = wrap(llama())
        sharers = 2 if "tensor" in name else 1  # of a batch
        train(model, rank // sharers, ranks // sharers)
        return whole_weights(model)

    for found in run_ranks(ranks, weights):
        for ours, theirs, before in zip(found, reference, start, strict=True):
            # Gradients are summed in another order; Newton-Schulz and AdamW's division carry that rounding on.
            assert float((ours - theirs).norm()) < 2e-3 * float((theirs - before).norm())


@pytest.mark.parametrize("name", ["tensor parallel 2 x fsdp2 2", "fsdp2, compiled, activation checkpointing"])
def test_a_step_that_begins_during_the_backward_pass_is_the_same_bits(name: str) -> None:
    ranks, wrap = ENGINES[name]

    def check(rank: int) -> None:
        plain, early = wrap(llama()), wrap(llama())
        sharers = 2 if "tensor" in name else 1
        for model in (plain, early):
            train(model, rank // sharers, ranks // sharers, early=model is early, chunk_bytes=8000)
        assert all(torch.equal(*weights) for weights in zip(whole_weights(early), whole_weights(plain), strict=True))

    run_ranks(ranks, check)


def test_mixed_precision_policies_work() -> None:
    def losses(rank: int) -> None:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model = shard(llama(), (2,), mp_policy=policy)
        train(model, rank, 2, momentum_state="linear8", wire="bf16")
        assert all(torch.isfinite(p).all() for p in whole_weights(model))

    run_ranks(2, losses)


def test_plain_tensors_of_a_distributed_job_are_replicas_of_each_other() -> None:
    def digests(rank: int) -> Tensor:
        model = DistributedDataParallel(llama())
        train(model, rank, 2, momentum_state="linear8", wire="int8", process_group=dist.new_group([0, 1]))
        return torch.cat([p.flatten() for p in whole_weights(model)])

    first, second = run_ranks(2, digests)
    assert torch.equal(first, second)
