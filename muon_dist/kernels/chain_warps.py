"""The jobs of the warps of a program of chain.py, which has the picture: loader, multiplier, storer.

``it`` counts the stages of the ring that were used, and ``uses0`` and ``uses1`` how often results were handed over in
the first and the second half of a multiplier's buffers: all jobs count alike, and know from it which phase of a barrier
to wait for. Phases are counted from 0 and told apart by their parity; who waits for what has never been used waits for
phase -1, which is over from the start.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from muon_dist.kernels.chain_tiles import (
    DEPTH,
    FENCE,
    STAGES,
    WAIT_FOR_STORES,
    assemble,
    draw,
    load,
    store,
    take,
    tile_of,
    turned,
)

_HALF = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))  # of [64, 128] in registers
_OPERAND_BYTES = gl.constexpr(2 * 128 * 64)
_RESULT_BYTES = gl.constexpr(2 * 64 * 128)


@gluon.jit
def loader(x, wide, tall, table, counts, barriers, buffers, geometry, TRANSPOSED: gl.constexpr):
    full, empty, added, handed, free, drawn, taken = barriers
    a, b, results, tickets = buffers
    s, k, n, tiles, total = geometry
    it = 0  # stages used
    uses0 = 0  # of the first and second half of results
    uses1 = 0
    turn = 0
    t = draw(counts, tickets, drawn, taken, 0)
    may_start = t < n * tiles
    while t < total:
        product, m, i, j, whole, crosses = tile_of(t, tiles, n, s)
        row = table + product * 8
        from_x = gl.load(row) != 0
        slot_d = gl.load(row + 3)
        depth = gl.where(from_x, k, s)
        height = depth if TRANSPOSED else s
        a_top = gl.where(from_x, m, gl.load(row + 1) * n + m) * height
        b_top = gl.where(from_x, m, gl.load(row + 2) * n + m) * height
        while may_start == 0:
            may_start = _has_arrived(counts, product - 1, m, tiles, n)
        assemble(FENCE)
        for start in range(0, depth, DEPTH):
            stage = it % STAGES
            mbarrier.wait(empty.index(stage), it // STAGES + 1 & 1)
            mbarrier.expect(full.index(stage), 3 * _OPERAND_BYTES, pred=whole)
            mbarrier.expect(full.index(stage), 2 * _OPERAND_BYTES, pred=whole == 0)
            place = (i, j, start, whole, full.index(stage), a.index(stage), b.index(stage))
            if from_x:
                _load_operands(x, a_top, b_top, place, TRANSPOSED)
            elif TRANSPOSED:
                _load_operands(wide, a_top, b_top, place, TRANSPOSED)
            else:
                _load_operands(tall, a_top, b_top, place, TRANSPOSED)
            it += 1
        if slot_d >= 0:
            for w in gl.static_range(2):
                mbarrier.wait(free.index(2 * w), uses0 + 1 & 1)
                mbarrier.wait(free.index(2 * w + 1), uses1 + 1 & 1)
                mbarrier.expect(added.index(w), 2 * _RESULT_BYTES, pred=whole)
                mbarrier.expect(added.index(w), _RESULT_BYTES, pred=whole == 0)
                top = (slot_d * n + m) * s + i * 128 + 64 * w
                load(wide, [top, j * 256], added.index(w), results.index(2 * w))
                load(wide, [top, j * 256 + 128], added.index(w), results.index(2 * w + 1), pred=whole)
        # While the last stages are multiplied: the next tile, and whether it has to wait. Not earlier, as others may
        # wait for a tile that is drawn.
        turn += 1
        t = draw(counts, tickets, drawn, taken, turn)
        uses0 += gl.where(crosses, 1, 2)
        if whole:
            stage = it % STAGES
            mbarrier.wait(empty.index(stage), it // STAGES + 1 & 1)
            mbarrier.arrive(full.index(stage))
            it += 1
            uses1 += 1
        product, m, _, _, _, _ = tile_of(t, tiles, n, s)
        may_start = (product == 0) | (t >= total)
        if may_start == 0:
            may_start = _has_arrived(counts, product - 1, m, tiles, n)


@gluon.jit
def _has_arrived(counts, product, m, tiles, n):
    """Whether all of a matrix's product is in memory; both storers count their parts of each tile."""
    return gl.atomic_add(counts + 1 + product * n + m, 0, sem="acquire", scope="gpu") >= 2 * tiles


@gluon.jit
def _load_operands(source, a_top, b_top, place, TRANSPOSED: gl.constexpr):
    """64 columns of A and B, or rows of their transposes, into a stage."""
    i, j, start, whole, full, a, b = place
    if TRANSPOSED:
        load(source, [a_top + start, i * 128], full, a)
        load(source, [b_top + start, j * 256], full, b.slice(0, 128, dim=1))
        load(source, [b_top + start, j * 256 + 128], full, b.slice(128, 128, dim=1), pred=whole)
    else:
        load(source, [a_top + i * 128, start], full, a)
        load(source, [b_top + j * 256, start], full, b.slice(0, 128, dim=0))
        load(source, [b_top + j * 256 + 128, start], full, b.slice(128, 128, dim=0), pred=whole)


@gluon.jit
def multiplier(table, scales, barriers, buffers, geometry, w: gl.constexpr, TRANSPOSED: gl.constexpr):
    full, empty, added, handed, free, drawn, taken = barriers
    a, b, results, tickets = buffers
    s, k, n, tiles, total = geometry
    half0 = results.index(2 * w)
    half1 = results.index(2 * w + 1)
    it = 0
    uses0 = 0
    uses1 = 0
    additions = 0
    turn = 0
    t = take(tickets, drawn, taken, turn)
    while t < total:
        product, m, i, j, whole, crosses = tile_of(t, tiles, n, s)
        row = table + product * 8
        adds = gl.load(row + 3) >= 0
        alpha = gl.load(scales + product * 4)
        beta = gl.load(scales + product * 4 + 1)
        diagonal = gl.load(scales + product * 4 + 2)
        steps = gl.where(gl.load(row) != 0, k, s) // DEPTH
        if whole:
            sums = _multiply(full, empty, a, b, it, steps, w, 256, TRANSPOSED)
            d0 = _added(half0, added.index(w), additions, adds)
            if adds == 0:
                mbarrier.wait(free.index(2 * w), uses0 + 1 & 1)
                mbarrier.wait(free.index(2 * w + 1), uses1 + 1 & 1)
            it += steps
            sums = _finish(sums, empty, it)
            first, second = sums.reshape((64, 2, 128)).permute((0, 2, 1)).split()
            first = alpha * gl.convert_layout(first, _HALF, assert_trivial=True) + beta * d0.to(gl.float32)
            stored = first.to(results.dtype)
            _hand_over(half0, stored, handed.index(3 * w))
            mbarrier.wait(full.index(it % STAGES), it // STAGES & 1)
            lent = _lent(a, b, it % STAGES, w, TRANSPOSED)
            _hand_over(lent, stored.permute((1, 0)), handed.index(3 * w + 2))
            second = alpha * gl.convert_layout(second, _HALF, assert_trivial=True)
            if adds:
                second += beta * half1.load(_HALF).to(gl.float32)
            if crosses:
                second = _with_diagonal(second, diagonal, w)
            stored = second.to(results.dtype)
            _hand_over(half1, stored, handed.index(3 * w + 1))
            uses0 += 1
            if crosses == 0:
                mbarrier.wait(free.index(2 * w), uses0 + 1 & 1)
                _hand_over(turned(half0), stored.permute((1, 0)), handed.index(3 * w))
                uses0 += 1
            it += 1
            uses1 += 1
        else:
            left = _multiply(full, empty, a, b, it, steps, w, 128, TRANSPOSED)
            d0 = _added(half0, added.index(w), additions, adds)
            if adds == 0:
                mbarrier.wait(free.index(2 * w), uses0 + 1 & 1)
            it += steps
            left = alpha * _finish(left, empty, it) + beta * d0.to(gl.float32)
            _hand_over(half0, _with_diagonal(left, diagonal, w).to(results.dtype), handed.index(3 * w))
            uses0 += 1
        additions += adds.to(gl.int32)
        turn += 1
        t = take(tickets, drawn, taken, turn)


@gluon.jit
def _multiply(full, empty, a, b, it, steps, w: gl.constexpr, COLUMNS: gl.constexpr, TRANSPOSED: gl.constexpr):
    """64 rows of A B^T, the last step of which is still under way."""
    sums = gl.zeros((64, COLUMNS), gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16]))
    for step in range(steps):
        stage = it % STAGES
        mbarrier.wait(full.index(stage), it // STAGES & 1)
        if TRANSPOSED:
            left = a.index(stage).slice(64 * w, 64, dim=1).permute((1, 0))
            right = b.index(stage).slice(0, COLUMNS, dim=1)
        else:
            left = a.index(stage).slice(64 * w, 64, dim=0)
            right = b.index(stage).slice(0, COLUMNS, dim=0).permute((1, 0))
        sums = warpgroup_mma(left, right, sums, use_acc=step > 0, is_async=True)
        sums = warpgroup_mma_wait(1, deps=(sums,))
        mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES), pred=step > 0)
        it += 1
    return sums


@gluon.jit
def _finish(sums, empty, it):
    sums = warpgroup_mma_wait(0, deps=(sums,))
    mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES))
    return sums


@gluon.jit
def _added(half, added, additions, adds):
    """D's first half, read while the last step is under way; zeros if there is none."""
    if adds:
        mbarrier.wait(added, additions & 1)
        d = half.load(_HALF)
    else:
        d = gl.zeros((64, 128), half.dtype, _HALF)
    return d


@gluon.jit
def _with_diagonal(values, diagonal, w: gl.constexpr):
    rows = gl.arange(0, 64, gl.SliceLayout(1, _HALF)) + 64 * w
    columns = gl.arange(0, 128, gl.SliceLayout(0, _HALF))
    return values + gl.where(rows[:, None] == columns[None, :], diagonal, 0.0)


@gluon.jit
def _hand_over(buffer, values, handed):
    buffer.store(values)
    fence_async_shared()
    mbarrier.arrive(handed)


@gluon.jit
def storer(wide, tall, table, counts, barriers, buffers, geometry, w: gl.constexpr, TRANSPOSED: gl.constexpr):
    full, empty, added, handed, free, drawn, taken = barriers
    a, b, results, tickets = buffers
    s, k, n, tiles, total = geometry
    half0 = results.index(2 * w)
    it = 0
    uses0 = 0
    uses1 = 0
    turn = 0
    t = take(tickets, drawn, taken, turn)
    while t < total:
        product, m, i, j, whole, crosses = tile_of(t, tiles, n, s)
        row = table + product * 8
        it += gl.where(gl.load(row) != 0, k, s) // DEPTH
        top = (gl.load(row + 4) * n + m) * s
        mbarrier.wait(handed.index(3 * w), uses0 & 1)
        store(wide, [top + i * 128 + 64 * w, j * 256], half0)
        uses0 += 1
        if whole:
            stage = it % STAGES
            mbarrier.wait(handed.index(3 * w + 2), uses1 & 1)
            store(tall, [top + j * 256, i * 128 + 64 * w], _lent(a, b, stage, w, TRANSPOSED))
            mbarrier.wait(handed.index(3 * w + 1), uses1 & 1)
            store(wide, [top + i * 128 + 64 * w, j * 256 + 128], results.index(2 * w + 1))
            tma.store_wait(pendings=2)
            mbarrier.arrive(free.index(2 * w))
            tma.store_wait(pendings=1)
            mbarrier.arrive(empty.index(stage))
            if crosses == 0:
                mbarrier.wait(handed.index(3 * w), uses0 & 1)
                store(tall, [top + j * 256 + 128, i * 128 + 64 * w], turned(half0))
                uses0 += 1
                tma.store_wait(pendings=0)
                mbarrier.arrive(free.index(2 * w))
            tma.store_wait(pendings=0)
            mbarrier.arrive(free.index(2 * w + 1))
            it += 1
            uses1 += 1
        else:
            tma.store_wait(pendings=0)
            mbarrier.arrive(free.index(2 * w))
        assemble(WAIT_FOR_STORES)
        gl.atomic_add(counts + 1 + product * n + m, 1, sem="release", scope="gpu")
        turn += 1
        t = take(tickets, drawn, taken, turn)


@gluon.jit
def _lent(a, b, stage, w: gl.constexpr, TRANSPOSED: gl.constexpr):
    """Room for [128, 64] in a stage of the ring."""
    if w == 0:
        room = a.index(stage)
    else:
        room = b.index(stage).slice(0, 128, dim=1 if TRANSPOSED else 0)
    if TRANSPOSED:
        room = turned(room)
    return room
