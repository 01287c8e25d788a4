"""The third job of the warps of a program of chain.py, which has the picture: a multiplier's 64 rows of a tile.

What it counts is what the others count, see chain_copies.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from muon_dist.kernels.chain_tiles import (
    ADDED,
    ALSO,
    DEPTH,
    DIAGONAL,
    FROM_X,
    KIND,
    POWER,
    REST,
    ROW,
    ROWS_SCALED,
    STAGES,
    SYMMETRIC,
    TERMS,
    on_loan,
    product_of,
    take,
    tile_of,
    turned,
)

# Steps after which sums of X X^T are put aside, where what rounding takes off it is kept: tensor cores cut each sum off
# instead of rounding it, which after thousands of columns is more than that.
_STEPS = gl.constexpr(64)
_HALF = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))  # of [64, 128] in registers


@gluon.jit
def multiplier(memory, table, barriers, buffers, geometry, w: gl.constexpr, TRANSPOSED: gl.constexpr):
    squares, aside, scales, factors, of_rows = memory
    full, empty, added, handed, free, drawn, taken = barriers
    a, b, results, tickets = buffers
    s, k, n, total = geometry
    half0 = results.index(2 * w)
    half1 = results.index(2 * w + 1)
    it = 0
    uses0 = 0
    uses1 = 0
    additions = 0
    turn = 0
    product = 0
    first_tile = 0
    t = take(tickets, drawn, taken, turn)
    while t < total:
        product, first_tile = product_of(t, product, first_tile, table, n)
        row = table + product * ROW
        m, i, left_column, whole, crosses = tile_of(t - first_tile, row, s)
        adds = gl.load(row + ADDED) >= 0
        slot_e = gl.load(row + ALSO)
        splits = gl.load(row + REST) >= 0
        kind = gl.load(row + KIND)
        power = gl.load(row + POWER)
        factor = gl.load(factors + m, mask=power > 0, other=1.0)
        factor *= gl.where(power > 1, factor, 1.0)
        alpha = factor * gl.load(scales + product * 4)
        beta = factor * gl.load(scales + product * 4 + 1)
        gamma = factor * gl.load(scales + product * 4 + 2)
        diagonal = factor * gl.load(scales + product * 4 + 3)
        from_x = gl.load(row + FROM_X) != 0
        steps = gl.load(row + TERMS) * gl.where(from_x, k, s) // DEPTH
        before = gl.where(from_x & splits, (steps - 1) // _STEPS * _STEPS, 0)
        e = squares + ((slot_e * n + m).to(gl.int64) * s + i * 128 + 64 * w) * s + left_column
        so_far = aside + ((m * s + i * 128 + 64 * w).to(gl.int64) * s + left_column)
        rows = of_rows + m * s + i * 128 + 64 * w + gl.arange(0, 64, gl.SliceLayout(1, _HALF))
        if whole:
            for start in range(0, before, _STEPS):
                sums = _multiply(full, empty, a, b, it, _STEPS, w, 256, TRANSPOSED)
                it += _STEPS
                first, second = _halves(_finish(sums, empty, it))
                _put_aside(so_far, s, first, start > 0)
                _put_aside(so_far + 128, s, second, start > 0)
            steps -= before
            sums = _multiply(full, empty, a, b, it, steps, w, 256, TRANSPOSED)
            e0 = _also_added(e, s, slot_e >= 0)
            scale = alpha * gl.load(rows, mask=kind == ROWS_SCALED, other=1.0)[:, None]
            it += steps
            first, second = _halves(_finish(sums, empty, it))
            if before > 0:
                first += _half_at(so_far, s)
                second += _half_at(so_far + 128, s)
            first *= scale
            if splits & (kind == SYMMETRIC):
                uses0, uses1 = _hand_over_split(first, True, half0, half1, handed, free, uses0, uses1, w)
                second *= scale
                uses0, uses1 = _hand_over_split(second, crosses == 0, half0, half1, handed, free, uses0, uses1, w)
            elif splits:
                mbarrier.wait(added.index(w), additions & 1)
                first += beta * half0.load(_HALF).to(gl.float32)
                second = scale * second + beta * half1.load(_HALF).to(gl.float32)
                uses0, uses1 = _hand_over_both(first, half0, half1, handed, free, uses0, uses1, w)
                uses0, uses1 = _hand_over_both(second, half0, half1, handed, free, uses0, uses1, w)
            else:
                first += gamma * e0.to(gl.float32)
                if adds:
                    mbarrier.wait(added.index(w), additions & 1)
                    first += beta * half0.load(_HALF).to(gl.float32)
                else:
                    mbarrier.wait(free.index(2 * w), uses0 + 1 & 1)
                    mbarrier.wait(free.index(2 * w + 1), uses1 + 1 & 1)
                stored = first.to(results.dtype)
                _hand_over(half0, stored, handed.index(3 * w))
                if kind == SYMMETRIC:
                    mbarrier.wait(full.index(it % STAGES), it // STAGES & 1)
                    lent = on_loan(a, b, it % STAGES, w, TRANSPOSED)
                    _hand_over(lent, stored.permute((1, 0)), handed.index(3 * w + 2))
                    it += 1
                second = scale * second + gamma * _also_added(e + 128, s, slot_e >= 0).to(gl.float32)
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
                uses1 += 1
        else:
            for start in range(0, before, _STEPS):
                left = _multiply(full, empty, a, b, it, _STEPS, w, 128, TRANSPOSED)
                it += _STEPS
                _put_aside(so_far, s, _finish(left, empty, it), start > 0)
            steps -= before
            left = _multiply(full, empty, a, b, it, steps, w, 128, TRANSPOSED)
            e0 = _also_added(e, s, slot_e >= 0)
            scale = alpha * gl.load(rows, mask=kind == ROWS_SCALED, other=1.0)[:, None]
            it += steps
            left = _finish(left, empty, it)
            if before > 0:
                left += _half_at(so_far, s)
            left *= scale
            if kind == DIAGONAL:
                mbarrier.wait(free.index(2 * w), uses0 + 1 & 1)
                gl.store(rows, _scales_for_diagonal(left, results.dtype, w))
                mbarrier.arrive(handed.index(3 * w))
                uses0 += 1
            elif splits & (kind == SYMMETRIC):
                uses0, uses1 = _hand_over_split(left, False, half0, half1, handed, free, uses0, uses1, w)
            elif splits:
                mbarrier.wait(added.index(w), additions & 1)
                left += beta * half0.load(_HALF).to(gl.float32)
                uses0, uses1 = _hand_over_both(left, half0, half1, handed, free, uses0, uses1, w)
            else:
                left += gamma * e0.to(gl.float32)
                if adds:
                    mbarrier.wait(added.index(w), additions & 1)
                    left += beta * half0.load(_HALF).to(gl.float32)
                else:
                    mbarrier.wait(free.index(2 * w), uses0 + 1 & 1)
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
def _halves(sums):
    """Columns of the left and of the right."""
    first, second = sums.reshape((64, 2, 128)).permute((0, 2, 1)).split()
    return gl.convert_layout(first, _HALF, assert_trivial=True), gl.convert_layout(second, _HALF, assert_trivial=True)


@gluon.jit
def _half_at(place, s):
    """[64, 128] from memory, as a multiplier has half of its sums."""
    rows = gl.arange(0, 64, gl.SliceLayout(1, _HALF))
    columns = gl.arange(0, 128, gl.SliceLayout(0, _HALF))
    return gl.load(place + rows[:, None] * s + columns[None, :])


@gluon.jit
def _put_aside(place, s, values, adds):
    """Adds half of the sums to what is in memory, or is the first to be there."""
    if adds:
        values += _half_at(place, s)
    rows = gl.arange(0, 64, gl.SliceLayout(1, _HALF))
    columns = gl.arange(0, 128, gl.SliceLayout(0, _HALF))
    gl.store(place + rows[:, None] * s + columns[None, :], values)


@gluon.jit
def _also_added(e, s, adds):
    """E's half, straight from memory; zeros if there is none."""
    if adds:
        values = _half_at(e, s)
    else:
        values = gl.zeros((64, 128), e.dtype.element_ty, _HALF)
    return values


@gluon.jit
def _with_diagonal(values, diagonal, w: gl.constexpr):
    rows = gl.arange(0, 64, gl.SliceLayout(1, _HALF)) + 64 * w
    columns = gl.arange(0, 128, gl.SliceLayout(0, _HALF))
    return values + gl.where(rows[:, None] == columns[None, :], diagonal, 0.0)


@gluon.jit
def _scales_for_diagonal(values, dtype: gl.constexpr, w: gl.constexpr):
    """By what rows are to be multiplied for their diagonal elements to be what they are rounded to."""
    rows = gl.arange(0, 64, gl.SliceLayout(1, _HALF)) + 64 * w
    columns = gl.arange(0, 128, gl.SliceLayout(0, _HALF))
    diagonal = gl.sum(gl.where(rows[:, None] == columns[None, :], values, 0.0), axis=1)
    return gl.where(diagonal == 0, 1.0, diagonal.to(dtype).to(gl.float32) / diagonal)


@gluon.jit
def _hand_over(buffer, values, handed):
    buffer.store(values)
    fence_async_shared()
    mbarrier.arrive(handed)


@gluon.jit
def _hand_over_both(values, half0, half1, handed, free, uses0, uses1, w: gl.constexpr):
    """Values in half precision in the first half, and what that loses of them in the second."""
    stored = values.to(half0.dtype)
    values -= stored.to(gl.float32)
    mbarrier.wait(free.index(2 * w), uses0 + 1 & 1)
    _hand_over(half0, stored, handed.index(3 * w))
    mbarrier.wait(free.index(2 * w + 1), uses1 + 1 & 1)
    _hand_over(half1, values.to(half0.dtype), handed.index(3 * w + 1))
    return uses0 + 1, uses1 + 1


@gluon.jit
def _hand_over_split(values, is_mirrored, half0, half1, handed, free, uses0, uses1, w: gl.constexpr):
    """Values in half precision and then what that loses of them; as they are in the first half, mirrored in the
    second."""
    for _ in gl.static_range(2):
        stored = values.to(half0.dtype)
        values -= stored.to(gl.float32)
        mbarrier.wait(free.index(2 * w), uses0 + 1 & 1)
        _hand_over(half0, stored, handed.index(3 * w))
        uses0 += 1
        if is_mirrored:
            mbarrier.wait(free.index(2 * w + 1), uses1 + 1 & 1)
            _hand_over(turned(half1), stored.permute((1, 0)), handed.index(3 * w + 1))
            uses1 += 1
    return uses0, uses1
