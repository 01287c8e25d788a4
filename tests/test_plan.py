"""The planner without a process group: every matrix once, what is sent is what is received, balance, bounds."""

from __future__ import annotations

import itertools
import math
import time
import tracemalloc
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard

from muon_dist.forms import Form, as_tables, flat_geometries
from muon_dist.layout import Geometry, Matrix
from muon_dist.plan import Plan, make_plan, polar_flops
from muon_dist.sharding import Home, geometries_of
from muon_dist.strips import strips
from muon_dist.wire import wire_format

WIRE = wire_format("bf16")
LLAMA_8B = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)] * 32


def home(replicas: int, shards: int) -> Home:
    where = tuple((rank // shards, rank % shards) for rank in range(replicas * shards))
    return Home(tuple(range(replicas * shards)), (replicas, shards), where, (Replicate(), Shard(0)))


def geometry_of(rows: int, cols: int, where: Home, turn: int = 0) -> Geometry:
    return geometries_of(Form((rows, cols), (rows,)), where, turn)[0]


def matrices(shapes: Sequence[tuple[int, int]], where: Home) -> list[Matrix]:
    return [Matrix(f"{i}.weight", geometry_of(*shape, where)) for i, shape in enumerate(shapes)]


shape_lists = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=12)


@given(shapes=shape_lists, replicas=st.integers(1, 3), shards=st.integers(1, 4), chunk_bytes=st.integers(1, 20_000))
@settings(max_examples=80, deadline=None)
def test_every_matrix_is_in_one_chunk_with_one_owner(
    shapes: list[tuple[int, int]], replicas: int, shards: int, chunk_bytes: int
) -> None:
    plan = make_plan(matrices(shapes, home(replicas, shards)), replicas * shards, WIRE, chunk_bytes)
    planned = [i for chunk in plan.chunks for bundle in chunk.bundles for i in bundle.matrices]
    assert sorted(planned) == list(range(len(shapes)))
    for chunk in plan.chunks:
        for bundle in chunk.bundles:
            assert {plan.owners[i] for i in bundle.matrices} == {bundle.owner}
            assert {plan.matrices[i].geometry for i in bundle.matrices} == {bundle.geometry}


@given(shapes=shape_lists, replicas=st.integers(1, 3), shards=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_what_one_rank_sends_is_what_the_other_expects(
    shapes: list[tuple[int, int]], replicas: int, shards: int
) -> None:
    ranks = replicas * shards
    plan = make_plan(matrices(shapes, home(replicas, shards)), ranks, WIRE, 10_000)
    ways = [(here, there) for c in plan.chunks for here, there in ((c.held, c.owned), (c.owned, c.held))]
    ways += [(spread.lent, spread.wanted) for chunk in plan.chunks for spread in chunk.spreads]
    for here, there in ways:
        for a in range(ranks):
            for b in range(ranks):
                assert here(a, ranks, WIRE).splits[b] == there(b, ranks, WIRE).splits[a]


@given(rows=st.integers(1, 60), cols=st.integers(1, 60), replicas=st.integers(1, 3), shards=st.integers(1, 5))
@settings(max_examples=80, deadline=None)
def test_pieces_cover_a_matrix_once_and_are_wanted_by_every_replica(
    rows: int, cols: int, replicas: int, shards: int
) -> None:
    where = home(replicas, shards)
    covered = [[0] * cols for _ in range(rows)]
    for piece in geometry_of(rows, cols, where).pieces:
        assert len(piece.wanted_by) == replicas
        for r in range(piece.rect.row, piece.rect.row + piece.rect.rows):
            for c in range(piece.rect.col, piece.rect.col + piece.rect.cols):
                covered[r][c] += 1
        for rank in piece.wanted_by:  # the holder among them, so it has the gradient
            stored = as_tables(where.region((rows, cols), where.placements, rank))
            inside = Form((rows, cols), (rows,)).box(0, piece.rect)
            assert stored.intersection(inside) == inside
        assert piece.rank in piece.wanted_by
    assert all(count == 1 for row in covered for count in row)


@pytest.mark.parametrize("ranks", [8, 64, 512])
def test_llama_8b_is_balanced(ranks: int) -> None:
    """Against the best that whole matrices allow: the mean, or, once there are more ranks than matrices, the largest
    matrix."""
    plan = make_plan(matrices(LLAMA_8B, home(1, ranks)), ranks, WIRE, 128 << 20)
    work = [polar_flops(*shape) for shape in LLAMA_8B]
    assert sum(plan.flops) == sum(work)
    assert max(plan.flops) <= 1.1 * max(sum(work) / ranks, *work)


def test_no_more_bytes_travel_than_the_matrices_need() -> None:
    """To the owner and back, all but the owner's own part: 2 (P / W) (W - 1) / W elements a rank."""
    ranks = 8
    plan = make_plan(matrices(LLAMA_8B, home(1, ranks)), ranks, WIRE, 128 << 20)
    elements = sum(rows * cols for rows, cols in LLAMA_8B)
    for rank in range(ranks):
        sides = [side(rank, ranks, WIRE) for chunk in plan.chunks for side in (chunk.held, chunk.owned)]
        sent = sum(n for side in sides for peer, n in enumerate(side.splits) if peer != rank)
        ideal = 2 * 2 * elements / ranks * (ranks - 1) / ranks
        assert sent == pytest.approx(ideal, rel=0.05)


def buffer_bytes(plan: Plan, rank: int) -> int:
    sides = [side for chunk in plan.chunks for side in (chunk.held, chunk.owned)]
    sides += [side for chunk in plan.chunks for spread in chunk.spreads for side in (spread.lent, spread.wanted)]
    return max(side(rank, plan.ranks, WIRE).nbytes for side in sides)


@pytest.mark.parametrize(("replicas", "shards"), [(1, 8), (8, 1), (2, 4)])
def test_buffers_are_bounded_whatever_the_size_of_the_model(replicas: int, shards: int) -> None:
    for layers in (2, 8):
        plan = make_plan(matrices(LLAMA_8B[: 7 * layers], home(replicas, shards)), 8, WIRE, 256 << 20)
        assert max(buffer_bytes(plan, rank) for rank in range(8)) <= 256 << 20


def zero2(shapes: Sequence[tuple[int, int]], ranks: int) -> list[Matrix]:
    """One flat buffer of all matrices, cut into equal runs."""
    length = math.ceil(sum(rows * cols for rows, cols in shapes) / ranks)
    found, start = [], 0
    for i, (rows, cols) in enumerate(shapes):
        cuts = [min(max(length * r - start, 0), rows * cols) for r in range(ranks + 1)]
        runs = tuple((a, b - a) for a, b in itertools.pairwise(cuts))
        found.append(Matrix(f"{i}.weight", *flat_geometries(Form((rows, cols), (rows,)), runs)))
        start += rows * cols
    return found


def test_where_ranks_hold_whole_matrices_only_those_on_a_border_travel() -> None:
    ranks, shapes = 8, LLAMA_8B[:-3]
    plan = make_plan(zero2(shapes, ranks), ranks, WIRE, 256 << 20)
    assert plan.imbalance <= 1.1
    on_border = {i for i, m in enumerate(plan.matrices) if len(m.geometry.pieces) > 1}
    travelling = {
        i
        for chunk in plan.chunks
        for bundle in chunk.bundles
        for i in bundle.matrices
        if {piece.rank for piece in bundle.geometry.pieces} != {bundle.owner}
    }
    assert len(on_border) == ranks - 1
    assert len(travelling - on_border) <= 2  # for the balance
    # All ranks work in every chunk but the last ones.
    assert len(plan.chunks) <= 1.5 * sum(r * c * 2 for r, c in shapes) / (ranks * (256 << 20)) + 1


def test_matrices_larger_than_a_chunk_keep_all_owners_at_work() -> None:
    """The largest sets the bound, which its owner's buffer needs anyway."""
    plan = make_plan(matrices([(64, 64), (64, 64), (2, 2)], home(1, 2)), 2, WIRE, 100)
    assert [sorted(bundle.owner for bundle in chunk.bundles) for chunk in plan.chunks] == [[0, 1], [0]]
    assert max(buffer_bytes(plan, rank) for rank in range(2)) == WIRE.nbytes(64, 64)


@pytest.mark.parametrize(("replicas", "shards"), [(1, 64), (8, 8), (64, 1)])
def test_replicas_keep_all_owners_at_work(replicas: int, shards: int) -> None:
    """Chunks are bounded by what ranks hold, not by the many times more that replicas want back."""
    plan = make_plan(matrices(LLAMA_8B, home(replicas, shards)), 64, WIRE, 128 << 20)
    assert len({bundle.owner for bundle in plan.chunks[0].bundles}) == 64
    assert max(buffer_bytes(plan, rank) for rank in (0, 63)) <= 128 << 20


def test_an_owner_copies_the_pieces_of_row_shards_at_once() -> None:
    """Also where the last ranks have fewer rows or none: 14336 rows on 60 ranks are 59 of 239 and one of 235."""
    for ranks in (4, 60, 1024):
        (chunk, *_) = make_plan(matrices(LLAMA_8B, home(1, ranks)), ranks, WIRE, 128 << 20).chunks
        for bundle in chunk.bundles:
            owned = chunk.owned(bundle.owner, ranks, WIRE).parcels
            found = strips([parcel for parcel in owned if parcel.bundle is bundle])
            assert len(found) <= 2
            assert sum(strip.pieces for strip in found) == len(bundle.geometry.pieces)


def test_a_plan_of_ten_thousand_matrices_on_1024_ranks_is_made_quickly_and_stays_small() -> None:
    """About 0.2 s and 3 MiB. What depends on the ranks is walked once a geometry, and a rank keeps its own sides."""
    ranks = 1024
    many = matrices(LLAMA_8B[:7] * 1429, home(1, ranks))
    started = time.perf_counter()
    plan = make_plan(many, ranks, WIRE, 128 << 20)
    assert time.perf_counter() - started < 2
    tracemalloc.start()
    make_plan(many, ranks, WIRE, 128 << 20)
    sides = [side(5, ranks, WIRE) for chunk in plan.chunks for side in (chunk.held, chunk.owned)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 << 20
    assert sum(len(side.parcels) for side in sides) < 3 * len(many)


def test_layers_share_their_geometry() -> None:
    """Also where replicas send the momentum by turns: else connecting walks ranks times matrices."""
    copies, ranks = 2, 8
    where = tuple((r // 4, r // 2 % 2, r % 2) for r in range(ranks))
    cut_both_ways = Home(tuple(range(ranks)), (2, 2, 2), where, (Replicate(), Shard(0), Shard(1)))
    assert cut_both_ways.momentum_copies == copies
    assert home(2, 4).momentum_copies == home(1, 8).momentum_copies == 1
    senders = [{p.rank for p in geometry_of(64, 64, cut_both_ways, turn).pieces} for turn in range(copies)]
    assert senders == [set(range(4)), set(range(4, 8))]
