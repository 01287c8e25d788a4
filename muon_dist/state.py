"""Optimizer state of one parameter: the tensors that a codec stores it in, as entries of ``optimizer.state[p]``.

State is plain tensors and DTensors under plain names, ``momentum_buffer`` in full precision and
``momentum_buffer_codes`` and ``momentum_buffer_scales`` where it is quantised, so that torch's checkpoints save and
reshard it without knowing codecs. Where an engine keeps many parameters in one flat buffer, their names go in front.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from muon_dist.codecs import FOUR_BIT_CODECS, LOW_RANK_CODECS, Codec, Sections, make_codec, make_low_rank_codec, nbytes
from muon_dist.forms import Form, as_tables
from muon_dist.layout import Extent, extent_of_run
from muon_dist.options import MomentumState, Options
from muon_dist.regions import Box, Region
from muon_dist.sharding import Home, Placements, block_of, extent_of, local, wrap_local

MOMENTUM, FIRST_MOMENT, SECOND_MOMENT, STEP_COUNT = "momentum_buffer", "exp_avg", "exp_avg_sq", "step"

# AdamW moments of parameters with fewer elements stay in fp32: they cost nothing, and norms and biases are sensitive.
SMALLEST_QUANTISED = 4096

# Codecs that are not row-wise start from where they are: it takes them some encodings to follow what is new.
_SETTLING = 4


@dataclass(frozen=True)
class StateLayout:
    """How a state of one parameter lies on the ranks.

    Attributes:
        shape: of the whole.
        region: which part of the parameter lies on this rank.
        block: elements that share a scale, for codecs that have one.
        mesh, placements: how the parts make the whole; mesh is None for a part that only this rank knows of.
        device: where the parts lie.
        extent: of a matrix, or of each of a stack; None for other shapes.
        form: of the parameter, for the momentum of matrices.
        pinned: whether ``device`` is the host and the memory page-locked: kernels address it over the bus, and are
            waited for before the host does.
    """

    shape: tuple[int, ...]
    region: Region
    block: int
    mesh: DeviceMesh | None
    placements: Placements
    device: torch.device
    extent: Extent | None
    form: Form | None = None
    pinned: bool = False

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's part."""
        return self.region.local_shape


def sharded_layout(
    shape: Sequence[int],
    home: Home,
    placements: Placements,
    rank: int,
    block_size: int,
    mesh: DeviceMesh | None,
    device: torch.device,
    form: Form | None = None,
) -> StateLayout:
    """Of a state that lies on ``home.ranks[rank]`` as ``placements`` say; its blocks never cross a cut."""
    whole = tuple(shape)
    region = home.region(whole, placements, rank)
    block = block_of(whole, home, placements, block_size) if whole else block_size
    extent = extent_of(whole, home, placements) if len(whole) >= 2 else None
    return StateLayout(whole, region, block, mesh, placements, device, extent, form)


def flat_layout(
    shape: Sequence[int], start: int, length: int, block_size: int, device: torch.device, form: Form | None = None
) -> StateLayout:
    """Of the state of a run of a flattened parameter of ``shape``: one row, its blocks counted from its start, and
    anew from where another matrix of ``form`` starts."""
    region = Region(tuple(shape), (start,), (length,), flat=True)
    return StateLayout((1, length), region, block_size, None, (), device, extent_of_run(shape, length), form)


@dataclass(frozen=True)
class StoredTensor:
    """A matrix-shaped (or any-shaped) fp32 quantity that lies in ``optimizer.state[p]`` through a codec."""

    prefix: str  # of its entries' names
    label: str  # its own name, such as "momentum_buffer"
    codec: Codec
    layout: StateLayout

    def create(self, state: MutableMapping[str, Any]) -> None:
        """Adds what is missing to a parameter's state, as zeros; empty parts of a whole too, to be loaded into. What is
        to be page-locked comes back from where a trainer took it: some take all that they load to the device."""
        layout = self.layout
        if layout.mesh is None and math.prod(layout.local_shape) == 0:
            return
        whole = self.codec.whole(layout.shape)
        for buffer, spec in self.codec.buffers(layout.local_shape).items():
            entry = self._entry(buffer)
            present = local(state[entry]) if entry in state else None
            if present is None or (layout.pinned and present.numel() and not present.is_pinned()):
                part = torch.zeros(spec.shape, dtype=spec.dtype, device=layout.device, pin_memory=layout.pinned)
                if present is not None:
                    part.copy_(present)
                state[entry] = wrap_local(part, whole[buffer].shape, layout.mesh, layout.placements)

    @cached_property
    def entries(self) -> dict[str, str]:
        """Their names in the parameter's state, by the codec's."""
        return {buffer: self._entry(buffer) for buffer in self.codec.buffers(self.layout.local_shape)}

    def addresses(self, state: MutableMapping[str, Any]) -> tuple[int, ...]:
        """Of this rank's buffers: while they are the same, so are the buffers."""
        return tuple(local(state[entry]).data_ptr() for entry in self.entries.values())

    def buffers(self, state: MutableMapping[str, Any]) -> dict[str, Tensor]:
        """This rank's buffers, by the codec's names."""
        return {buffer: local(state[entry]) for buffer, entry in self.entries.items()}

    def piece(self, state: MutableMapping[str, Any], box: Box) -> tuple[Codec, dict[str, Tensor]]:
        """Codec and buffers of a matrix's piece, which is all that this rank has at ``box`` of the tables."""
        buffers = self.buffers(state)
        table, rows, cols = box.slices_in(as_tables(self.layout.region))
        if isinstance(self.codec, Sections):
            return self.codec.section(cols.start, buffers)
        if len(self.layout.shape) == 3:
            buffers = {name: buffer[table.start] for name, buffer in buffers.items()}
        if self.codec.row_wise:
            buffers = {name: buffer[rows] for name, buffer in buffers.items()}
        return self.codec, buffers

    @property
    def nbytes(self) -> int:
        """Bytes on this rank."""
        return nbytes(self.codec, self.layout.local_shape)

    def encode(self, values: Tensor, buffers: Mapping[str, Tensor]) -> None:
        """Stores fp32 values of ``layout.local_shape``, whatever ``buffers`` held before."""
        for _ in range(1 if self.codec.row_wise else _SETTLING):
            self.codec.encode(values, buffers)

    def decode(self, state: MutableMapping[str, Any]) -> Tensor:
        """This rank's part, fp32, of ``layout.local_shape``."""
        return self.codec.decode(self.buffers(state), (1, *self.layout.local_shape)[-1])

    def _entry(self, buffer: str) -> str:
        return f"{self.prefix}{self.label}_{buffer}" if buffer else f"{self.prefix}{self.label}"


def codec_of(
    label: str, codec: MomentumState, block: int, extent: Extent | None = None, rank_fraction: float | None = None
) -> Codec:
    """The codec called ``codec`` for the state called ``label``.

    Args:
        extent, rank_fraction: of matrices, for the codecs that only they have.

    Raises:
        ValueError: columns are cut where two codes share a byte.
    """
    if codec in FOUR_BIT_CODECS and extent is not None and extent.cuts[1] > 1 and extent.part[1] % 2:
        raise ValueError(
            f"{codec} stores two columns a byte, and this layout cuts columns every {extent.part[1]}: use a codec of 8 "
            f"bits, or shard the columns at even places"
        )
    if codec == "grasp4" or codec == "lowrank4":
        assert extent is not None
        return make_low_rank_codec(codec, block, extent, rank_fraction)
    return make_codec(codec, block, signed=label != SECOND_MOMENT)


def codec_of_run(
    label: str,
    codec: MomentumState,
    block: int,
    region: Region,
    form: Form | None = None,
    rank_fraction: float | None = None,
) -> Codec:
    """The codec of a run of a flattened parameter; arguments as of :func:`codec_of`.

    Args:
        form: of the parameter, for the momentum of matrices.
    """
    lengths = [section.length for section in form.sections(*region.offset, *region.size)] if form else []
    shape = form.shape[-2:] if form else region.shape
    codecs = [codec_of(label, codec, block, extent_of_run(shape, n), rank_fraction) for n in lengths or region.size]
    return Sections(tuple(codecs), tuple(lengths)) if len(codecs) > 1 else codecs[0]


def momentum_of(layout: StateLayout, options: Options, prefix: str = "") -> StoredTensor:
    """The momentum of matrices. Raises ValueError where the codec cannot store matrices that lie like this."""
    name, block, form = options.momentum_state, layout.block, layout.form
    if name in LOW_RANK_CODECS and form is not None and len(form.splits) > 1:
        raise ValueError(
            f"{name} keeps one subspace of all rows of a parameter that a rank has, but splits cut it into {form}: use "
            f"a momentum_state that works row by row, such as nf4, or do not split it"
        )
    if layout.region.flat:
        codec = codec_of_run(MOMENTUM, name, block, layout.region, form, options.rank_fraction)
    else:
        codec = codec_of(MOMENTUM, name, block, layout.extent, options.rank_fraction)
    if options.offload_momentum and layout.device.type == "cuda":
        layout = replace(layout, device=torch.device("cpu"), pinned=True)
    return StoredTensor(prefix, MOMENTUM, codec, layout)


def moments_of(
    shape: Sequence[int], layout: StateLayout, options: Options, prefix: str = ""
) -> tuple[StoredTensor, StoredTensor]:
    """AdamW's first and second moment of a parameter of ``shape``."""
    quantised = len(shape) >= 2 and math.prod(shape) >= SMALLEST_QUANTISED
    name = options.adamw_state if quantised else "fp32"
    first, second = (
        StoredTensor(prefix, label, codec_of(label, name, layout.block), layout)
        for label in (FIRST_MOMENT, SECOND_MOMENT)
    )
    return first, second


def step_count_of(device: torch.device, prefix: str = "") -> StoredTensor:
    """AdamW's count of steps: a number that every rank has."""
    layout = StateLayout((), Region((), (), ()), 1, None, (), device, None)
    return StoredTensor(prefix, STEP_COUNT, codec_of(STEP_COUNT, "fp32", 1), layout)
