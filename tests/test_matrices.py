"""Matrices inside parameters: however a parameter is cut over ranks, it trains as its matrices would on their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from muon_dist import DistMuon
from muon_dist.forms import Form, Forms, flat_geometries
from muon_dist.memory import estimated_state_bytes, measured_state_bytes
from muon_dist.regions import Box
from tests.ranks import run_ranks

STEPS = 3
Place = Callable[[Tensor], Tensor]
SHAPES: dict[str, tuple[int, ...]] = {
    "experts.down": (5, 12, 20),
    "experts.gate_up": (3, 28, 16),
    "qkv.weight": (36, 24),
    "heads.weight": (24, 32),
    "conv.weight": (10, 4, 3, 3),
    "conv1d.weight": (12, 6, 2),
    "plain.weight": (20, 12),
}
SPLITS = {"*.gate_up": (12, 16), "qkv.*": (20, 8, 8), "heads.*": (6, 6, 6, 6)}
# A table of each stack, as nested lists of the rows of its matrices.
ROWS = {"experts.gate_up": (12, 16), "qkv.weight": (20, 8, 8), "heads.weight": (6, 6, 6, 6)}


def separate(name: str, whole: Tensor) -> list[Tensor]:
    """The matrices of a parameter, by hand."""
    tables = list(whole) if name.startswith("experts") else [whole.flatten(1)]
    return [matrix for table in tables for matrix in table.split(ROWS.get(name, (len(table),)))]


def values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def train(
    layout: Place, layout_of_gradients: Place | None = None, **options: Any
) -> tuple[dict[str, nn.Parameter], DistMuon]:
    parameters = {name: nn.Parameter(layout(value)) for name, value in values(0).items()}
    optimizer = DistMuon(list(parameters.items()), splits=SPLITS, wire="fp32", chunk_bytes=5000, **options)
    for step in range(STEPS):
        for name, gradient in values(1 + step).items():
            parameters[name].grad = (layout_of_gradients or layout)(gradient)
        optimizer.step()
    return parameters, optimizer


def train_separately(**options: Any) -> dict[str, list[Tensor]]:
    """The weights of every matrix, trained as parameters of their own in a single process."""
    parameters = {name: [nn.Parameter(m.clone()) for m in separate(name, v)] for name, v in values(0).items()}
    named = [(f"{name}.{i}.weight", p) for name, found in parameters.items() for i, p in enumerate(found)]
    optimizer = DistMuon(named, wire="fp32", **options)
    for step in range(STEPS):
        for name, gradient in values(1 + step).items():
            for p, g in zip(parameters[name], separate(name, gradient), strict=True):
                p.grad = g.clone()
        optimizer.step()
    return {name: [p.detach() for p in found] for name, found in parameters.items()}


def placed(mesh_shape: tuple[int, ...], *placements: Placement) -> Callable[[], Place]:
    return lambda: lambda t: distribute_tensor(t, init_device_mesh("cpu", mesh_shape), placements)


def tensor_parallel() -> Place:
    """Rows cut by tensor parallelism, then by FSDP2, whose mesh dimension comes first."""
    mesh = init_device_mesh("cpu", (2, 2))
    fsdp, tp = mesh.get_coordinate()  # type: ignore[misc]

    def part(t: Tensor, index: int) -> Tensor:
        return (*t.chunk(2), t[:0])[index]

    def place(t: Tensor) -> Tensor:
        placements = [_StridedShard(0, split_factor=2), Shard(0)]
        return DTensor.from_local(part(part(t, tp), fsdp), mesh, placements, shape=t.shape, stride=t.stride())

    return place


def inside_experts() -> Place:
    mesh = init_device_mesh("cpu", (2,))
    return lambda t: distribute_tensor(t, mesh, [Shard(2 if t.ndim == 3 and t.shape[2] > 2 else 0)])


# Ranks, layout, and whether rows are whole: else blocks are others, and only fp32 is the same to the bit.
LAYOUTS: dict[str, tuple[int, Callable[[], Place], bool]] = {
    "single": (1, lambda: torch.clone, True),
    "fsdp x2": (2, placed((2,), Shard(0)), True),
    "fsdp x3": (3, placed((3,), Shard(0)), True),
    "fsdp x4": (4, placed((4,), Shard(0)), True),
    "dimension 1 x2": (2, placed((2,), Shard(1)), False),
    "dimension 2 of experts x2": (2, inside_experts, False),
    "dimensions 0 and 1": (4, placed((2, 2), Shard(0), Shard(1)), False),
    "hsdp 2x2": (4, placed((2, 2), Replicate(), Shard(0)), False),
    "ddp x3": (3, lambda: torch.clone, True),
    "tp 2 x fsdp 2": (4, tensor_parallel, True),
}


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, list[Tensor]]]:
    return {state: train_separately(momentum_state=state) for state in ("fp32", "linear8", "nf4")}


def whole(p: Tensor) -> Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_parameter_trains_as_its_matrices_on_their_own(name: str, references: Any) -> None:
    ranks, make, rows_are_whole = LAYOUTS[name]

    def check(rank: int) -> None:
        layout = make()
        for state in references if rows_are_whole else ["fp32"]:
            parameters, _ = train(layout, momentum_state=state)
            for key, p in parameters.items():
                for i, (ours, theirs) in enumerate(zip(separate(key, whole(p)), references[state][key], strict=True)):
                    assert torch.equal(ours, theirs), (state, key, i)

    run_ranks(ranks, check)


def test_partial_sums_are_added_up_on_ranks_that_hold_less(references: Any) -> None:
    """Sequence parallelism leaves gradients of replicated parameters so. Of three ranks the last holds no piece of some
    matrices, and has to take part."""

    def check(rank: int) -> None:
        mesh = init_device_mesh("cpu", (3,))

        def replicated(t: Tensor) -> Tensor:
            return DTensor.from_local(t.clone(), mesh, [Replicate()])

        def partial(t: Tensor) -> Tensor:
            return DTensor.from_local(t * [2.0, -1.0, 0.0][rank], mesh, [Partial()])

        parameters, _ = train(replicated, partial, momentum_state="fp32")
        for key, p in parameters.items():
            for ours, theirs in zip(separate(key, whole(p)), references["fp32"][key], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)

    run_ranks(3, check)


@pytest.mark.parametrize("state", ["lowrank4", "grasp4"])
def test_experts_have_low_rank_parts_of_their_own(state: str) -> None:
    """Sharded over experts each lies whole on a rank, and is stored as it would be alone."""

    def parameter(value: Tensor) -> nn.Parameter:
        return nn.Parameter(distribute_tensor(value, init_device_mesh("cpu", (2,)), [Shard(0)]))

    def run(make: Callable[[Tensor], nn.Parameter], parts: Callable[[Tensor], Sequence[Tensor]]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        whole_values = [torch.randn(5, 24, 32, generator=generator) for _ in range(STEPS + 1)]
        found = [make(part.clone()) for part in parts(whole_values[0])]
        named = [(f"experts.{i}", p) for i, p in enumerate(found)]
        optimizer = DistMuon(named, momentum_state=state, wire="fp32")  # type: ignore[arg-type]
        for gradient in whole_values[1:]:
            for p, g in zip(found, parts(gradient), strict=True):
                p.grad = make(g.clone()).detach()
            optimizer.step()
        return [whole(p) for p in found]

    alone = run(nn.Parameter, list)

    def check(rank: int) -> None:
        (together,) = run(parameter, lambda t: [t])
        torch.testing.assert_close(list(together), alone, rtol=0, atol=1e-5)

    run_ranks(2, check)


def test_the_state_of_matrices_costs_what_is_estimated() -> None:
    def check(rank: int) -> None:
        for shards, replicas, layout in ((2, 2, LAYOUTS["hsdp 2x2"]), (4, 1, LAYOUTS["fsdp x4"])):
            _, optimizer = train(layout[1](), momentum_state="linear8")
            expected = estimated_state_bytes(
                optimizer.grouping(), shards=shards, replicas=replicas, options=optimizer.options
            )
            assert rank or measured_state_bytes(optimizer) == expected

    run_ranks(4, check)


@given(
    stack=st.integers(1, 3),
    splits=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    cols=st.integers(1, 4),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    box=st.tuples(*[st.integers(0, 3)] * 6),
)
@settings(max_examples=100, deadline=None)
def test_any_part_of_a_parameter_is_pieces_of_its_matrices(
    stack: int, splits: list[int], cols: int, cuts: list[int], box: tuple[int, ...]
) -> None:
    form = Form((stack, sum(splits), cols), tuple(splits))
    tables = torch.arange(stack * sum(splits) * cols).view(form.shape)
    matrices = [matrix for table in tables for matrix in table.split(splits)]

    part = Box(box[:3], box[3:]).intersection(Box((0, 0, 0), (stack, sum(splits), cols))) or Box((0,) * 3, (0,) * 3)
    pieces = [matrices[i][r.row : r.row + r.rows, r.col : r.col + r.cols] for i, r in form.rects_in(part)]
    expected = tables[tuple(slice(o, o + n) for o, n in zip(*part, strict=True))]
    found = torch.cat([piece.flatten() for piece in pieces]) if pieces else torch.empty(0)
    assert sorted(found.tolist()) == sorted(expected.flatten().tolist())

    ends = sorted({0, tables.numel(), *(min(cut, tables.numel()) for cut in cuts)})
    runs = tuple((a, b - a) for a, b in itertools.pairwise(ends))
    for matrix, geometry in zip(matrices, flat_geometries(form, runs), strict=True):
        elements = []
        for rank, rect, *_ in geometry.pieces:
            taken = matrix.flatten()[rect.col : rect.col + rect.cols]
            assert runs[rank][0] <= int(taken[0]) <= int(taken[-1]) < sum(runs[rank])
            elements += taken.tolist()
        assert elements == matrix.flatten().tolist()


def test_what_matrices_a_parameter_has_is_told() -> None:
    shapes = {**SHAPES, "embeddings.patch_embeddings.projection.weight": (8, 3, 4, 4), "dw.weight": (8, 1, 3, 3)}
    shapes |= {"convnet.experts.up": (2, 4, 8), "cls_token": (1, 1, 8), "experts.gate_up_bias": (4, 8)}
    named = [(name, nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]
    optimizer = DistMuon(named, splits=SPLITS, transposed=["plain.*"])
    table = {line.split()[0]: " ".join(line.split()[2:]) for line in str(optimizer.grouping()).splitlines()[1:-2]}
    assert table == {
        "experts.down": "muon 5 of 12x20 a stack of experts, by its name",
        "experts.gate_up": "muon 3 of (12x16, 16x16) a stack of experts, by its name",
        "qkv.weight": "muon 20x24, 2 of 8x24 a hidden matrix",
        "heads.weight": "muon 4 of 6x32 a hidden matrix",
        "conv.weight": "muon 10x36 a convolution",
        "conv1d.weight": "muon 12x12 a convolution",
        "plain.weight": "muon 20x12, transposed a hidden matrix",
        "convnet.experts.up": "muon 2 of 4x8 a stack of experts, by its name",
        "embeddings.patch_embeddings.projection.weight": "adamw - an embedding, by its name",
        "dw.weight": "adamw - a depthwise convolution: a filter of its own for each channel",
        "cls_token": "adamw - 3-D, and not named as experts or a convolution",
        "experts.gate_up_bias": "adamw - biases, by their name",
    }


def test_the_scale_of_an_update_knows_outputs_from_inputs() -> None:
    gradient = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))

    def update(value: Tensor, **options: Any) -> Tensor:
        p = nn.Parameter(torch.zeros_like(value))
        p.grad = value.clone()
        # It makes less than the default of sums in another order.
        DistMuon([("w", p)], lr=1.0, wire="fp32", polar="polar_express", **options).step()
        return p.detach()

    torch.testing.assert_close(update(gradient, transposed=["w"]), update(gradient.mT.contiguous()).mT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": {"*.weight": (20, 8)}}, r"qkv.weight has shape \(36, 24\): 36 rows.*splits\['\*.weight'\].*28"),
        ({"splits": {"qkv.weight": 12}}, r"splits\['qkv.weight'\]=12"),
        ({"splits": {"qkv.weight": (36, 0)}}, r"splits\['qkv.weight'\].*positive"),
        ({"transposed": "qkv"}, "transposed='qkv'.*list"),
    ],
)
def test_matrices_that_do_not_make_the_parameter_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistMuon([("qkv.weight", nn.Parameter(torch.ones(36, 24)))], **options)


def test_what_cannot_be_cut_into_matrices_is_refused_by_name() -> None:
    qkv = nn.Parameter(torch.ones(36, 24))
    with pytest.raises(ValueError, match=r"qkv: lowrank4 keeps one subspace.*12x24, 24x24.*nf4"):
        DistMuon([("qkv", qkv)], splits={"qkv": (12, 24)}, momentum_state="lowrank4").state_dict()
    conv = nn.Parameter(torch.ones(8, 4, 3, 3).to(memory_format=torch.channels_last))
    with pytest.raises(ValueError, match=r"conv.weight is a convolution.*channels_last.*contiguous_format"):
        DistMuon([("conv.weight", conv)]).state_dict()

    def check(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2,))
        p = nn.Parameter(distribute_tensor(torch.ones(8, 4, 4, 3), mesh, [Shard(2)]))
        with pytest.raises(ValueError, match=r"conv.weight is a convolution.*Shard\(dim=2\).*dimension 0"):
            DistMuon([("conv.weight", p)]).state_dict()

    run_ranks(2, check)


def test_names_and_patterns_do_not_see_wrappers() -> None:
    forms = Forms({"a.*": (1, 3), "*": (2, 2)})
    assert forms.of("a.w", (4, 4)).splits == (1, 3)  # the first that fits
    assert forms.of("b.w", (4, 4)).splits == (2, 2)
    for wrapper in ("module.", "_orig_mod.", "_checkpoint_wrapped_module.", "module._orig_mod."):
        assert forms.of(f"{wrapper}a.w", (4, 4)).splits == (1, 3)
        (head,) = DistMuon([(f"{wrapper}output.weight", nn.Parameter(torch.ones(4, 4)))]).grouping()
        assert head.algorithm == "adamw"
