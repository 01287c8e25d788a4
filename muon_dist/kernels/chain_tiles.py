"""What the warps of chain.py's programs have in common: the tiles and how they are shared out, memory, barriers."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from muon_dist.kernels import CHAIN_DEPTH, CHAIN_TILE

TILE = gl.constexpr(CHAIN_TILE)  # rows of a tile, and half of its columns
DEPTH = gl.constexpr(CHAIN_DEPTH)  # of a stage
STAGES = gl.constexpr(3)
_GROUP = gl.constexpr(4)  # pairs of rows of tiles that are worked on together: they share what they read
LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
# What the copy engine has written is there, for this program; what others wrote may be read by the copy engine.
WAIT_FOR_STORES = gl.constexpr("cp.async.bulk.wait_group 0; fence.proxy.async.global; bar.warp.sync -1; mov.u32 $0, 0;")
FENCE = gl.constexpr("fence.proxy.async.global; mov.u32 $0, 0;")

# By the names they have in Triton 3.7 and later, and before.
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_IS_NAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


# What stands where in a row of the table of products: slots, of which -1 is none; the factors of one or two terms; with
# which power of X's factor the result goes.
FROM_X, TERMS, FACTORS, ADDED, ALSO, OUT, REST, KIND, POWER, TILES, ROW = map(
    gl.constexpr, (0, 1, 2, 6, 7, 8, 9, 10, 11, 12, 13)
)
# Which tiles of a result are computed: all; those on and below the diagonal; those on the diagonal, of which nothing is
# kept but by what each row is to be multiplied; all, with rows multiplied by that.
ALL, SYMMETRIC, DIAGONAL, ROWS_SCALED = map(gl.constexpr, (0, 1, 2, 3))


@gluon.jit
def product_of(t, product, first, table, n):
    """The product that the t-th tile is of, and the first tile of that product; from those of an earlier tile. One that
    has no end follows the last product."""
    behind = first + n * gl.load(table + product * ROW + TILES)
    while t >= behind:
        product += 1
        first = behind
        behind += n * gl.load(table + product * ROW + TILES)
    return product, first


@gluon.jit
def tile_of(tile, row, s):
    """Matrix, row, and first column of a product's tile; whether it is whole, and whether it crosses the diagonal.
    ``row`` is that of the table.

    Row 2 g and row 2 g + 1 of a symmetric product's tiles have g + 1 each, the last of which crosses the diagonal; in
    row 2 g only the left half of that one is on or below it, and that half is all that is computed. Others have all
    tiles, of which none has a mirror image to be stored, as if all crossed the diagonal; the last in a row may have no
    right half. _GROUP pairs of rows are worked on column by column. Of the diagonal alone, tiles are left halves.
    """
    tiles = gl.load(row + TILES)
    m = tile // tiles
    tile -= m * tiles
    columns = (s // TILE + 1) // 2
    kind = gl.load(row + KIND)
    if kind == SYMMETRIC:
        first = _root(tile) // _GROUP * _GROUP  # pair of the group
        tile -= first * (first + 1)
        rows = gl.minimum(2 * _GROUP, s // TILE - 2 * first)
        is_left = tile < rows * first  # of the blocks that cross the diagonal in these rows
        beyond = gl.maximum(tile - rows * first, 0)
        pair = _root(beyond)
        within = beyond - pair * (pair + 1)
        odd = within // (pair + 1)
        column = within - odd * (pair + 1)
        i = 2 * first + gl.where(is_left, tile % rows, 2 * pair + odd)
        left = gl.where(is_left, tile // rows, first + column) * 256
        crosses = (is_left == 0) & (column == pair)
        whole = (crosses == 0) | (odd == 1)
    elif kind == DIAGONAL:
        i = tile
        left = tile * 128
        crosses = tile >= 0
        whole = tile < 0
    else:
        first = tile // (2 * _GROUP * columns) * (2 * _GROUP)
        tile -= first * columns
        rows = gl.minimum(2 * _GROUP, s // TILE - first)
        i = first + tile % rows
        left = tile // rows * 256
        crosses = first >= 0
        whole = left + 128 < s
    return m, i, left, whole, crosses


@gluon.jit
def _root(t):
    """The largest g with g (g + 1) <= t."""
    return ((gl.sqrt((4 * t + 1).to(gl.float32)) - 1) / 2 + 1e-3).to(gl.int32)


@gluon.jit
def draw(counts, tickets, drawn, taken, turn):
    """The next tile of the queue, made known to the other warps."""
    slot = turn % 4
    t = gl.atomic_add(counts, 1, sem="relaxed")
    mbarrier.wait(taken.index(slot), turn // 4 + 1 & 1)
    tickets.index(slot).store(gl.full([32], t, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(drawn.index(slot))
    return t


@gluon.jit
def take(tickets, drawn, taken, turn):
    """The tile that the loader has drawn, for the warps of one job."""
    slot = turn % 4
    mbarrier.wait(drawn.index(slot), turn // 4 & 1)
    t = gl.max(tickets.index(slot).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)
    mbarrier.arrive(taken.index(slot))
    return t


@gluon.jit
def new_barriers(number: gl.constexpr, arrivals: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(barriers.index(i), count=arrivals)
    return barriers


@gluon.jit
def turned(buffer):
    """[128, 64] in the memory of [64, 128]."""
    if _IS_NAMED:
        other = buffer.reinterpret(buffer.dtype, [128, 64], LAYOUT)
    else:
        other = buffer._reinterpret(buffer.dtype, [128, 64], LAYOUT)
    return other


@gluon.jit
def assemble(text: gl.constexpr):
    gl.inline_asm_elementwise(text, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def on_loan(a, b, stage, w: gl.constexpr, TRANSPOSED: gl.constexpr):
    """Room for [128, 64] in a stage of the ring."""
    if w == 0:
        room = a.index(stage)
    else:
        room = b.index(stage).slice(0, 128, dim=1 if TRANSPOSED else 0)
    if TRANSPOSED:
        room = turned(room)
    return room
