"""AdamW in one pass over a parameter and both moments, fp32 or dynamic8; parameters of about a size in one launch.

Reference: ``AdamWParameter.update`` in ``muon_dist/adamw.py``.

Source of the update: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from muon_dist.kernels import Encoded
from muon_dist.kernels.table import (
    FORMATS,
    Key,
    addresses,
    aligned,
    bits,
    common_block,
    constants,
    grid,
    number_in,
    pointer_in,
    table_on,
    tile_of_piece,
)
from muon_dist.kernels.tiles import Tiling, load_levels, load_search, load_tile, store_tile, tile_of

# Larger parameters have launches of their own: these take the device longer than the host.
_LARGEST_OF_MANY = 1 << 25
# Elements that are launched without waiting for more, so that the device has work while the host finds the rest.
_ENOUGH = 1 << 26
_SMALLEST_DIVISOR = tl.constexpr(2.0**-63)


class Rates(NamedTuple):
    """What kernels take of a group: an update is w decay - lr m / (sqrt(v) + eps), moments corrected by the step."""

    lr: float
    weight1: float
    weight2: float
    log2_beta1: float
    log2_beta2: float
    eps: float
    decay: float

    @classmethod
    def of(cls, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> Rates:
        log2_beta1, log2_beta2 = (math.log2(beta) if beta else -math.inf for beta in betas)
        return cls(lr, 1 - betas[0], 1 - betas[1], log2_beta1, log2_beta2, eps, 1 - lr * weight_decay)


@lru_cache(maxsize=64)
def _fields(rates: Rates) -> tuple[int, ...]:
    """Of a table's row."""
    return tuple(map(bits, rates))


class Entry(NamedTuple):
    """What a row of the table says of a parameter in every step.

    Attributes:
        alike: parameters of which this is the same can share a launch.
        maps: levels and search of both moments.
        blocks: of the parameter.
        stored: addresses of elements and scales of both moments, and of the step.
    """

    alike: Key
    maps: tuple[Tensor, ...]
    blocks: int
    stored: tuple[int, ...]

    @classmethod
    def of(cls, weight: Tensor, gradient: Tensor, step: Tensor, first: Encoded, second: Encoded) -> Entry | None:
        """None where a parameter cannot share a launch. Arguments are those of :func:`adamw`."""
        block = common_block(weight, first, second) if weight.numel() <= _LARGEST_OF_MANY else 0
        moments = addresses(first, second)
        if not block or not aligned(moments):
            return None
        # Every parameter of a launch is given as many programs as the largest needs: one has at most twice as many.
        size = weight.numel().bit_length()
        alike = (weight.device, weight.dtype, gradient.dtype, first.format, second.format, block, size)
        maps = (*first.pointers[2:], *second.pointers[2:])
        return cls(alike, maps, weight.numel() // block, (*moments, step.data_ptr()))


def adamw(weight: Tensor, gradient: Tensor, step: Tensor, first: Encoded, second: Encoded, rates: Rates) -> None:
    """One step.

    Args:
        weight, gradient: [rows, cols], contiguous, fp32, bf16 or fp16.
        step: fp32 scalar on the same device: the number of this step, from 1; 0 for one that is not taken, which
            changes nothing.
        first, second: the moments, in one block; updated in place.
    """
    tiling = Tiling.of(weight, first, second)
    _adamw[tiling.grid](
        weight,
        gradient,
        step,
        *first.pointers,
        *second.pointers,
        *tiling.shape,
        *rates,
        FIRST=first.format,
        SECOND=second.format,
        **tiling.constants,
    )


class AdamWBatch:
    """Collects parameters for :func:`adamw`; ``taken`` as for ``table_on``."""

    def __init__(self, taken: Tensor | None) -> None:
        self._taken = taken
        self._pieces: dict[Key, list[list[int]]] = {}
        self._gradients: list[Tensor] = []  # as in AccumulateBatch
        self._maps: dict[Key, tuple[Tensor, ...]] = {}

    def take(self, entry: Entry, weight: Tensor, gradient: Tensor, rates: Rates) -> bool:
        """Whether the parameter is taken. Its step is counted either way."""
        place = [gradient.data_ptr(), weight.data_ptr()]
        if not aligned(place):
            return False
        rows = self._pieces.setdefault(entry.alike, [])
        rows.append([entry.blocks, *place, *entry.stored, *_fields(rates)])
        self._gradients.append(gradient)
        self._maps[entry.alike] = entry.maps
        if len(rows) * weight.numel() >= _ENOUGH:
            self._launch(entry.alike)
        return True

    def launch(self) -> None:
        """Computes what was taken."""
        for key in list(self._pieces):
            self._launch(key)

    def _launch(self, key: Key) -> None:
        rows = self._pieces.pop(key)
        device, weight, gradient, first, second, block, _ = key
        _adamw_many[grid(rows, block)](
            table_on(device, rows, self._taken),
            *self._maps[key],
            WEIGHT=FORMATS[weight],
            GRADIENT=FORMATS[gradient],
            FIRST=first,
            SECOND=second,
            FIELDS=len(rows[0]),
            **constants(block),
        )


@triton.jit
def _adamw(
    weight,
    gradient,
    step,
    first,
    first_scales,
    first_levels,
    first_search,
    second,
    second_scales,
    second_levels,
    second_search,
    rows,
    cols,
    stride,
    blocks,
    numel,
    lr,
    weight1,
    weight2,
    log2_beta1,
    log2_beta2,
    eps,
    decay,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    first_levels, second_levels = load_levels(first_levels, FIRST), load_levels(second_levels, SECOND)
    first_search, second_search = load_search(first_search, FIRST), load_search(second_search, SECOND)
    t = tl.load(step)
    rows = tl.where(t > 0, rows, 0)  # masks all of a step that is not taken
    there, tile = tile_of(tl.program_id(0), rows, cols, stride, blocks, numel, BLOCK, ROWS, COLS)
    _, mask = tile[0]
    g = tl.load(gradient + there, mask=mask, other=0).to(tl.float32)
    w = tl.load(weight + there, mask=mask, other=0).to(tl.float32)
    m = load_tile(first, first_scales, first_levels, tile, 1 - weight1, FIRST)
    v = load_tile(second, second_scales, second_levels, tile, 1.0, SECOND)
    w, m, v = _updated(w, g, m, v, t, lr, weight1, weight2, log2_beta1, log2_beta2, eps, decay)
    tl.store(weight + there, w, mask=mask)
    store_tile(m, first, first_scales, first_search, tile, FIRST)
    store_tile(v, second, second_scales, second_search, tile, SECOND)


@triton.jit
def _adamw_many(
    table,
    first_levels,
    first_search,
    second_levels,
    second_search,
    WEIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    fields = table + tl.program_id(1) * FIELDS
    rows = tl.load(fields)
    # Not under the condition: Triton has no types for names that are maps there and pointers elsewhere.
    first_levels, second_levels = load_levels(first_levels, FIRST), load_levels(second_levels, SECOND)
    first_search, second_search = load_search(first_search, FIRST), load_search(second_search, SECOND)
    if tl.program_id(0) * ROWS < rows:
        gradient = pointer_in(fields + 1, GRADIENT)
        weight = pointer_in(fields + 2, WEIGHT)
        first, first_scales = pointer_in(fields + 3, FIRST), pointer_in(fields + 4, "bf16")
        second, second_scales = pointer_in(fields + 5, SECOND), pointer_in(fields + 6, "bf16")
        t = tl.load(tl.load(fields + 7).to(tl.pointer_type(tl.float32)))
        tile = tile_of_piece(tl.program_id(0), rows, BLOCK, ROWS)
        place, mask = tile[0]
        g = tl.load(gradient + place, mask=mask).to(tl.float32)
        w = tl.load(weight + place, mask=mask).to(tl.float32)
        weight1 = number_in(fields + 9)
        m = load_tile(first, first_scales, first_levels, tile, 1 - weight1, FIRST)
        v = load_tile(second, second_scales, second_levels, tile, 1.0, SECOND)
        w, m, v = _updated(
            w,
            g,
            m,
            v,
            t,
            number_in(fields + 8),
            weight1,
            number_in(fields + 10),
            number_in(fields + 11),
            number_in(fields + 12),
            number_in(fields + 13),
            number_in(fields + 14),
        )
        tl.store(weight + place, w, mask=mask)
        store_tile(m, first, first_scales, first_search, tile, FIRST)
        store_tile(v, second, second_scales, second_search, tile, SECOND)


@triton.jit
def _updated(w, g, m, v, t, lr, weight1, weight2, log2_beta1, log2_beta2, eps, decay):
    """Weight and moments after step ``t``; ``m`` has decayed."""
    m += weight1 * g
    v += weight2 * (g * g - v)
    rate = lr / (1 - tl.exp2(t * log2_beta1))
    correction2 = 1 / (1 - tl.exp2(t * log2_beta2))
    # The inverse root of the divisor's square costs less than a division. The bound only matters where v is no normal
    # number.
    divisor = tl.maximum(tl.sqrt(v * correction2) + eps, _SMALLEST_DIVISOR)
    return w * decay - rate * m * tl.rsqrt(divisor * divisor), m, v
