"""Kernels against the plain torch beside their callers: compiled on CUDA, in Triton's interpreter elsewhere.

The same optimizer takes the same steps twice, once through kernels and once through the references.
"""

from __future__ import annotations

from typing import Any, cast, get_args
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from muon_dist import DistMuon, kernels
from muon_dist.codecs import CODECS, LOW_RANK_CODECS, make_codec
from muon_dist.exchange import assembled
from muon_dist.layout import Rect
from muon_dist.options import Wire
from muon_dist.plan import Parcel
from muon_dist.strips import Strip
from muon_dist.wire import wire_format

if not kernels.HAS_TRITON:
    pytest.skip("triton is not installed", allow_module_level=True)

from muon_dist.kernels import recode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = 1e-5
# Rounding differs in the last bit, so a few elements fall to the neighbouring code; and the interpreter cuts elements
# off to bf16 where compiled kernels round them.
ROUNDED = 2e-3 if DEVICE == "cuda" else 1e-2
# Whole tiles, ragged rows and columns, a single element; blocks that are powers of two and that are not.
SHAPES: dict[str, tuple[int, ...]] = {
    "a.weight": (40, 256),
    "b.weight": (33, 150),
    "c.weight": (1, 1),
    "d.weight": (3, 700),
    "e.weight": (130, 128),
}
ADAMW_SHAPES: dict[str, tuple[int, ...]] = {
    "embed_tokens.weight": (33, 150),
    "lm_head.weight": (40, 256),
    "head_norm.weight": (256,),
    "norm.weight": (37,),
    "scale": (),
}


def train(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Weights, and decoded states, after two steps."""
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    named = [(name, nn.Parameter(random(shape))) for name, shape in shapes.items()]
    optimizer = DistMuon(named, polar_dtype=torch.float32, **options)
    for _ in range(2):
        for _, p in named:
            p.grad = random(tuple(p.shape))
        optimizer.step()
    binding = optimizer._bind()
    stored = [(p.shard.state, p.momentum) for p in binding.muon]
    stored += [(p.shard.state, moment) for p in binding.adamw for moment in (p.exp_avg, p.exp_avg_sq)]
    return [p.detach().float() for _, p in named], [s.decode(state) for state, s in stored]


def train_both_ways(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and states after two steps by kernels, and by the references."""
    ways = []
    with pytest.MonkeyPatch.context() as patch:
        for fused in (True, False):
            patch.setattr(kernels, "usable_on", lambda device, fused=fused: fused)
            weights, states = train(shapes, dtype, **options)
            ways.append([*weights, *states])
    return ways[0], ways[1]


def require_equal(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, tolerance: float, **options: Any) -> None:
    for ours, theirs in zip(*train_both_ways(shapes, dtype, **options), strict=True):
        assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm())


@pytest.mark.parametrize("momentum_state", CODECS)
@pytest.mark.parametrize("wire", ["fp32", "bf16", "int8", "nf4"])
@pytest.mark.parametrize("block_size", [128, 50])
def test_accumulate_and_apply(momentum_state: str, wire: str, block_size: int) -> None:
    options = {"wire": wire, "block_size": block_size, "nesterov": wire != "fp32"}
    if momentum_state not in LOW_RANK_CODECS:
        tolerance = EXACT if momentum_state == wire == "fp32" else ROUNDED
        require_equal(SHAPES, torch.float32, tolerance, momentum_state=momentum_state, **options)
        return
    # Rounding turns subspaces a little, and the rest, in other codes, makes up for it: both are as near to what they
    # store.
    exact = [t for found in train(SHAPES, torch.float32, momentum_state="fp32", **options) for t in found]
    by_kernels, by_references = train_both_ways(SHAPES, torch.float32, momentum_state=momentum_state, **options)
    for ours, theirs, true in zip(by_kernels, by_references, exact, strict=True):
        assert float((ours - true).norm()) <= 1.1 * float((theirs - true).norm()) + ROUNDED * float(true.norm())
        if DEVICE == "cpu":  # where operands of products are fp32 in both, they are also near to each other
            assert float((ours - theirs).norm()) <= 0.03 * float(theirs.norm())


@pytest.mark.parametrize("momentum_state", ["fp32", "dynamic8", "int4"])
def test_a_program_takes_several_tiles(momentum_state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muon_dist.kernels.batches._PROGRAMS", 1)
    tolerance = EXACT if momentum_state == "fp32" else ROUNDED
    require_equal({"w": (130, 256)}, torch.float32, tolerance, momentum_state=momentum_state, wire="fp32")


@pytest.mark.parametrize("momentum_state", ["linear8", "nf4", "lowrank4"])
def test_pieces_of_parameters(momentum_state: str) -> None:
    shapes = {"experts.up": (2, 12, 40), "conv.weight": (6, 4, 3, 3), "qkv.weight": (14, 48)}
    splits = {} if momentum_state == "lowrank4" else {"experts.up": (5, 7), "qkv.weight": (8, 3, 3)}
    # A code that rounding moves is a large part of pieces as small as these; CUDA's products are of half precision.
    tolerance = (0.03 if DEVICE == "cpu" else 0.1) if momentum_state == "lowrank4" else ROUNDED
    require_equal(shapes, torch.float32, tolerance, momentum_state=momentum_state, wire="fp32", splits=splits)


@pytest.mark.parametrize("adamw_state", ["fp32", "dynamic8"])
@pytest.mark.parametrize("block_size", [128, 50])
def test_adamw(adamw_state: str, block_size: int) -> None:
    tolerance = EXACT if adamw_state == "fp32" else ROUNDED
    require_equal(ADAMW_SHAPES, torch.float32, tolerance, adamw_state=adamw_state, block_size=block_size, adamw_lr=0.01)


def test_a_launch_that_has_enough_does_not_wait_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muon_dist.kernels.adamw._ENOUGH", 64 * 128)
    shapes: dict[str, tuple[int, ...]] = {f"{i}.embed_tokens.weight": (32, 128) for i in range(5)}
    require_equal(shapes, torch.float32, ROUNDED, adamw_state="dynamic8", adamw_lr=0.01)


def test_bf16_parameters_and_gradients() -> None:
    require_equal({**SHAPES, **ADAMW_SHAPES}, torch.bfloat16, 2 * ROUNDED, adamw_state="dynamic8")


@pytest.mark.parametrize("fused", [True, False], ids=["kernels", "references"])
@pytest.mark.parametrize("momentum_state", CODECS)
def test_a_step_that_is_not_taken_changes_no_bit(momentum_state: Any, fused: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(kernels, "usable_on", lambda device: fused)
    torch.manual_seed(0)
    # Matrices that a launch takes with others and alone, AdamW's moments in 8 bits and in full.
    shapes = {
        name: {**SHAPES, **ADAMW_SHAPES}[name] for name in ("a.weight", "d.weight", "embed_tokens.weight", "scale")
    }
    named = [(name, nn.Parameter(torch.randn(shape, device=DEVICE))) for name, shape in shapes.items()]
    named.append(("half.weight", nn.Parameter(torch.randn(16, 128, device=DEVICE, dtype=torch.bfloat16))))
    optimizer = DistMuon(named, momentum_state=momentum_state, adamw_state="dynamic8", nonfinite="skip")

    def step(bad: str | None) -> list[Tensor]:
        """Weights and state after a step in which the gradient of ``bad`` is not finite."""
        for name, p in named:
            p.grad = torch.randn_like(p)
            if name == bad:
                p.grad.view(-1)[-1] = float("nan" if name == "a.weight" else "inf")
        optimizer.step()
        state = [t for entries in optimizer.state.values() for t in entries.values()]
        return [t.detach().clone() for t in (*(p for _, p in named), *state)]

    start = [p.detach().clone() for _, p in named]
    assert all(torch.equal(a, b) for a, b in zip(step("scale"), start, strict=False))
    before = step(None)
    assert not any(torch.equal(a, b) for a, b in zip(before, start, strict=False))
    for bad in ("a.weight", "embed_tokens.weight"):
        assert all(torch.equal(a, b) for a, b in zip(step(bad), before, strict=True))
    assert optimizer.skipped_steps == 3


def test_state_is_read_and_written_where_it_was_moved_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines put other tensors into ``optimizer.state``."""
    monkeypatch.setattr(kernels, "usable_on", lambda device: True)
    left = []

    def trained(*, moves: bool) -> list[Tensor]:
        torch.manual_seed(0)
        shapes = {name: {**SHAPES, **ADAMW_SHAPES}[name] for name in ("a.weight", "embed_tokens.weight")}
        named = [(name, nn.Parameter(torch.randn(shape, device=DEVICE))) for name, shape in shapes.items()]
        optimizer = DistMuon(named, adamw_state="dynamic8", adamw_lr=0.01)
        for _ in range(3):
            for _, p in named:
                p.grad = torch.randn_like(p)
            optimizer.step()
            for entries in optimizer.state.values() if moves else ():
                left.append(dict(entries))
                entries.update({name: stored.clone() for name, stored in entries.items()})
        state = [t for entries in optimizer.state.values() for t in entries.values()]
        return [*(p.detach() for _, p in named), *state]

    assert all(torch.equal(a, b) for a, b in zip(trained(moves=True), trained(moves=False), strict=True))


@pytest.mark.parametrize("momentum_state", CODECS)
def test_nan_stays_visible(momentum_state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "usable_on", lambda device: True)
    p = nn.Parameter(torch.ones(4, 8, device=DEVICE))
    p.grad = torch.ones_like(p)
    p.grad[1, 3] = float("nan")
    optimizer = DistMuon([("w", p)], momentum_state=momentum_state)
    optimizer.step()
    (bound,) = optimizer._bind().muon
    assert bound.momentum.decode(bound.shard.state)[1, 3].isnan()


@pytest.mark.parametrize("name", ["linear8", "dynamic8", "nf4"])
def test_several_pieces_are_encoded_and_decoded_in_one_launch(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pieces of each of three matrices, as they lie in the exchange's buffers: those of a rank together."""
    codec, shape = make_codec(name), (3, 2, 5, 256)
    torch.manual_seed(0)
    pieces = torch.randn(shape, device=DEVICE)

    def stored(fused: bool) -> tuple[dict[str, Tensor], Tensor]:
        monkeypatch.setattr(kernels, "usable_on", lambda device: fused)
        buffers = {
            key: torch.zeros(2, 2, 3, *spec.shape[2:], dtype=spec.dtype, device=DEVICE)[:, 0].transpose(0, 1)
            for key, spec in codec.buffers(shape).items()
        }
        codec.encode(pieces, buffers)
        return buffers, codec.decode(buffers, 256, out=torch.empty_like(pieces))

    with mock.patch.object(recode, "encode", wraps=recode.encode) as encode:
        (ours, decoded), (theirs, expected) = stored(fused=True), stored(fused=False)
    assert encode.call_count == 1
    assert torch.equal(ours["scales"], theirs["scales"])
    assert float((decoded - expected).norm()) <= ROUNDED * float(expected.norm())


@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("name", get_args(Wire))
def test_pieces_of_all_ranks_become_matrices_and_pieces_again(
    name: Wire, axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire, n, ranks, (rows, cols) = wire_format(name), 2, 3, (4, 128)
    nbytes, frame = wire.nbytes(rows, cols), (rows * (ranks if axis == 0 else 1), cols * (ranks if axis == 1 else 1))
    # Each rank's pieces lie behind one of another bundle.
    strip = Strip(Parcel(cast(Any, None), Rect(0, 0, rows, cols), nbytes, nbytes), ranks, axis, (n + 1) * nbytes)
    whole = torch.randn((n, *frame), generator=torch.Generator().manual_seed(0)).to(DEVICE, wire.dtype)
    found = []
    for fused in (True, False):
        monkeypatch.setattr(kernels, "usable_on", lambda device, fused=fused: fused)
        buffer = torch.zeros(ranks * (n + 1) * nbytes, dtype=torch.uint8, device=DEVICE)
        packed = strip.in_buffer(buffer, 0, n)
        wire.pack(strip.of_whole(whole), packed)
        found.append(assembled(wire, frame, [strip], [packed]))
        assert not bool(buffer.view(ranks, n + 1, nbytes)[:, 0].any())
    ours, theirs = found
    tolerance = ROUNDED if name in ("int8", "nf4") else 0
    assert float((ours.float() - theirs.float()).norm()) <= tolerance * float(theirs.float().norm())
    assert tolerance or torch.equal(ours, whole)
