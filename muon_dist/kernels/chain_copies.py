"""Two jobs of the warps of a program of chain.py, which has the picture: loader and storer, who copy.

``it`` counts the stages of the ring that were used, ``uses0`` and ``uses1`` how often results were handed over in the
first and the second half of a multiplier's buffers, and ``loans`` how often in a stage of the ring: all jobs count
alike, and know from it which phase of a barrier to wait for. Phases are counted from 0 and told apart by their parity;
who waits for what has never been used waits for phase -1, which is over from the start.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from muon_dist.kernels.chain_tiles import (
    ADDED,
    DEPTH,
    DIAGONAL,
    FACTORS,
    FENCE,
    FROM_X,
    KIND,
    OUT,
    REST,
    ROW,
    STAGES,
    SYMMETRIC,
    TERMS,
    TILES,
    WAIT_FOR_STORES,
    assemble,
    draw,
    load,
    on_loan,
    product_of,
    store,
    take,
    tile_of,
    turned,
)

_OPERAND_BYTES = gl.constexpr(2 * 128 * 64)
_RESULT_BYTES = gl.constexpr(2 * 64 * 128)


@gluon.jit
def loader(x, wide, tall, table, counts, barriers, buffers, geometry, TRANSPOSED: gl.constexpr):
    full, empty, added, handed, free, drawn, taken = barriers
    a, b, results, tickets = buffers
    s, k, n, total = geometry
    it = 0
    uses0 = 0
    uses1 = 0
    turn = 0
    product = 0
    first = 0
    t = draw(counts, tickets, drawn, taken, 0)
    may_start = t < n * gl.load(table + TILES)
    while t < total:
        product, first = product_of(t, product, first, table, n)
        row = table + product * ROW
        m, i, left, whole, crosses = tile_of(t - first, row, s)
        from_x = gl.load(row + FROM_X) != 0
        slot_d = gl.load(row + ADDED)
        splits = gl.load(row + REST) >= 0
        depth = gl.where(from_x, k, s)
        height = depth if TRANSPOSED else s
        while may_start == 0:
            may_start = _has_arrived(counts, product - 1, m, table, n)
        assemble(FENCE)
        for term in range(gl.load(row + TERMS)):
            a_top = gl.where(from_x, m, gl.load(row + FACTORS + 2 * term) * n + m) * height
            b_top = gl.where(from_x, m, gl.load(row + FACTORS + 2 * term + 1) * n + m) * height
            for start in range(0, depth, DEPTH):
                stage = it % STAGES
                mbarrier.wait(empty.index(stage), it // STAGES + 1 & 1)
                mbarrier.expect(full.index(stage), 3 * _OPERAND_BYTES, pred=whole)
                mbarrier.expect(full.index(stage), 2 * _OPERAND_BYTES, pred=whole == 0)
                place = (i, left, start, whole, full.index(stage), a.index(stage), b.index(stage))
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
                load(wide, [top, left], added.index(w), results.index(2 * w))
                load(wide, [top, left + 128], added.index(w), results.index(2 * w + 1), pred=whole)
        # While the last stages are multiplied: the next tile, and whether it has to wait. Not earlier, as others may
        # wait for a tile that is drawn.
        turn += 1
        t = draw(counts, tickets, drawn, taken, turn)
        if splits & (gl.load(row + KIND) == SYMMETRIC):
            uses0 += gl.where(whole, 4, 2)
            uses1 += gl.where(whole, gl.where(crosses, 2, 4), 0)
        elif splits:
            uses0 += gl.where(whole, 2, 1)
            uses1 += gl.where(whole, 2, 1)
        else:
            uses0 += gl.where(crosses, 1, 2)
            uses1 += whole.to(gl.int32)
            if whole & (gl.load(row + KIND) == SYMMETRIC):
                stage = it % STAGES
                mbarrier.wait(empty.index(stage), it // STAGES + 1 & 1)
                mbarrier.arrive(full.index(stage))
                it += 1
        may_start = t >= total
        if may_start == 0:
            product, first = product_of(t, product, first, table, n)
            m, _, _, _, _ = tile_of(t - first, table + product * ROW, s)
            may_start = product == 0
            if may_start == 0:
                may_start = _has_arrived(counts, product - 1, m, table, n)


@gluon.jit
def _has_arrived(counts, product, m, table, n):
    """Whether all of a matrix's product is in memory; both storers count their parts of each tile."""
    parts = 2 * gl.load(table + product * ROW + TILES)
    return gl.atomic_add(counts + 1 + product * n + m, 0, sem="acquire", scope="gpu") >= parts


@gluon.jit
def _load_operands(source, a_top, b_top, place, TRANSPOSED: gl.constexpr):
    """64 columns of A and B, or rows of their transposes, into a stage."""
    i, left, start, whole, full, a, b = place
    if TRANSPOSED:
        load(source, [a_top + start, i * 128], full, a)
        load(source, [b_top + start, left], full, b.slice(0, 128, dim=1))
        load(source, [b_top + start, left + 128], full, b.slice(128, 128, dim=1), pred=whole)
    else:
        load(source, [a_top + i * 128, start], full, a)
        load(source, [b_top + left, start], full, b.slice(0, 128, dim=0))
        load(source, [b_top + left + 128, start], full, b.slice(128, 128, dim=0), pred=whole)


@gluon.jit
def storer(wide, tall, table, counts, barriers, buffers, geometry, w: gl.constexpr, TRANSPOSED: gl.constexpr):
    full, empty, added, handed, free, drawn, taken = barriers
    a, b, results, tickets = buffers
    s, k, n, total = geometry
    half0 = results.index(2 * w)
    half1 = results.index(2 * w + 1)
    it = 0
    uses0 = 0
    uses1 = 0
    loans = 0
    turn = 0
    product = 0
    first = 0
    t = take(tickets, drawn, taken, turn)
    while t < total:
        product, first = product_of(t, product, first, table, n)
        row = table + product * ROW
        m, i, left, whole, crosses = tile_of(t - first, row, s)
        it += gl.load(row + TERMS) * gl.where(gl.load(row + FROM_X) != 0, k, s) // DEPTH
        top = (gl.load(row + OUT) * n + m) * s
        slot_rest = gl.load(row + REST)
        across = i * 128 + 64 * w
        if (slot_rest >= 0) & (gl.load(row + KIND) == SYMMETRIC):
            for half in range(gl.where(whole, 2, 1)):
                down = left + half * 128
                is_mirrored = whole & ((half == 0) | (crosses == 0))
                for is_rest in gl.static_range(2):
                    place = (slot_rest * n + m) * s if is_rest else top
                    mbarrier.wait(handed.index(3 * w), uses0 & 1)
                    store(wide, [place + across, down], half0)
                    uses0 += 1
                    if is_mirrored:
                        mbarrier.wait(handed.index(3 * w + 1), uses1 & 1)
                        store(tall, [place + down, across], turned(half1))
                        uses1 += 1
                    tma.store_wait(pendings=0)
                    mbarrier.arrive(free.index(2 * w))
                    mbarrier.arrive(free.index(2 * w + 1), pred=is_mirrored)
        elif slot_rest >= 0:
            place = (slot_rest * n + m) * s + across
            for half in range(gl.where(whole, 2, 1)):
                down = left + half * 128
                mbarrier.wait(handed.index(3 * w), uses0 & 1)
                store(wide, [top + across, down], half0)
                uses0 += 1
                mbarrier.wait(handed.index(3 * w + 1), uses1 & 1)
                store(wide, [place, down], half1)
                uses1 += 1
                tma.store_wait(pendings=1)
                mbarrier.arrive(free.index(2 * w))
                tma.store_wait(pendings=0)
                mbarrier.arrive(free.index(2 * w + 1))
        else:
            mbarrier.wait(handed.index(3 * w), uses0 & 1)
            if gl.load(row + KIND) != DIAGONAL:
                store(wide, [top + across, left], half0)
            uses0 += 1
            if whole:
                is_lent = gl.load(row + KIND) == SYMMETRIC
                stage = it % STAGES
                if is_lent:
                    mbarrier.wait(handed.index(3 * w + 2), loans & 1)
                    store(tall, [top + left, across], on_loan(a, b, stage, w, TRANSPOSED))
                mbarrier.wait(handed.index(3 * w + 1), uses1 & 1)
                store(wide, [top + across, left + 128], half1)
                uses1 += 1
                if is_lent:
                    tma.store_wait(pendings=2)
                    mbarrier.arrive(free.index(2 * w))
                    tma.store_wait(pendings=1)
                    mbarrier.arrive(empty.index(stage))
                    it += 1
                    loans += 1
                else:
                    tma.store_wait(pendings=0)
                    mbarrier.arrive(free.index(2 * w))
                if crosses == 0:
                    mbarrier.wait(handed.index(3 * w), uses0 & 1)
                    store(tall, [top + left + 128, across], turned(half0))
                    uses0 += 1
                    tma.store_wait(pendings=0)
                    mbarrier.arrive(free.index(2 * w))
                tma.store_wait(pendings=0)
                mbarrier.arrive(free.index(2 * w + 1))
            else:
                tma.store_wait(pendings=0)
                mbarrier.arrive(free.index(2 * w))
        assemble(WAIT_FOR_STORES)
        gl.atomic_add(counts + 1 + product * n + m, 1, sem="release", scope="gpu")
        turn += 1
        t = take(tickets, drawn, taken, turn)
