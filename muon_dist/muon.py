"""The Muon part: momentum, polar factor and update of one rank's pieces. The math, without the schedule.

    B <- momentum B + (1 - momentum) G            in fp32, stored through a codec
    U  = polar((1 - momentum) G + momentum B)     with Nesterov, else polar(B); of the whole matrix, on its owner
    W <- (1 - lr weight_decay) W - lr scale(rows, cols) U

Source: Keller Jordan, https://kellerjordan.github.io/posts/muon; decoupled weight decay and the scale that matches
AdamW's update RMS: "Muon is Scalable for LLM Training", arXiv 2502.16982. The polar factor is taken of the momentum
before it is stored, so a codec's error enters only with the next step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from muon_dist import kernels
from muon_dist.codecs import Codec
from muon_dist.exchange import PackedPiece
from muon_dist.forms import Form, as_tables
from muon_dist.layout import Matrix, Rect
from muon_dist.memo import Memo
from muon_dist.options import Options, PolarForm, UpdateScale
from muon_dist.polar import Schedule, default_dtype, polar_factor
from muon_dist.regions import Box
from muon_dist.shards import Shard
from muon_dist.stacks import AccumulateStacks, Member, accumulate_pieces
from muon_dist.staging import on_device
from muon_dist.state import StoredTensor, momentum_of
from muon_dist.wire import WireFormat

if kernels.HAS_TRITON:
    from muon_dist.kernels import batches
    from muon_dist.kernels import momentum as momentum_kernels
    from muon_dist.kernels.batches import AccumulateBatch, ApplyBatch, Entry

# Factor on an orthogonal update, by outputs and inputs of the matrix. Its RMS is 1/sqrt(max(outputs, inputs)) before.
UPDATE_SCALES: dict[UpdateScale, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda outputs, inputs: 0.2 * math.sqrt(max(outputs, inputs)),
    "spectral": lambda outputs, inputs: math.sqrt(max(1, outputs / inputs)),
    "none": lambda outputs, inputs: 1.0,
}


@dataclass(frozen=True)
class MuonParameter:
    """One parameter of matrices on this rank."""

    shard: Shard
    form: Form
    momentum: StoredTensor
    matrices: tuple[MuonMatrix, ...]

    @classmethod
    def of(cls, shard: Shard, options: Options) -> MuonParameter:
        """Raises ValueError for a parameter that Muon cannot take."""
        if len(shard.shape) < 2:
            raise ValueError(
                f"{shard.name} was a matrix when the optimizer was made and has shape {shard.shape} now: an engine has "
                f"put it in a buffer of its own. Make the optimizer with the class that muon_dist.integrations has "
                f"for this engine"
            )
        form = options.forms.of(shard.name, shard.shape)
        geometries = shard.geometries(form)
        try:
            momentum = momentum_of(shard.momentum_layout(form, options.block_size), options, shard.prefix)
        except ValueError as error:
            raise ValueError(f"{shard.name}: {error}") from None
        names = [shard.name] if form.count == 1 else [f"{shard.name}[{i}]" for i in range(form.count)]
        matrices = (
            MuonMatrix(shard, form, momentum, i, Matrix(name, geometry))
            for i, (name, geometry) in enumerate(zip(names, geometries, strict=True))
        )
        return cls(shard, form, momentum, tuple(matrices))

    def create_state(self) -> None:
        """Adds what is missing to the parameter's state."""
        self.momentum.create(self.shard.state)


@dataclass(frozen=True)
class MuonMatrix:
    """One matrix of a parameter, as far as it lies on this rank."""

    shard: Shard  # of the parameter
    form: Form
    momentum: StoredTensor  # of the parameter
    index: int  # in the form
    matrix: Matrix

    def accumulate(
        self,
        rect: Rect,
        wire: WireFormat,
        packed: Tensor,
        taken: Tensor | None,
        batch: AccumulateBatch | None,
        stacks: AccumulateStacks,
    ) -> None:
        """Takes the gradient into the momentum and packs what is to be orthogonalised; zeros where there is none.

        Args:
            taken: whether the step is, as ``MuonWork`` has it.
            batch, stacks: may take the work, to be launched later; the first is None if there are no kernels.
        """
        whole = self.shard.gradient()
        if whole is None:
            packed.zero_()  # zeros in every wire format
            return
        entry = self._entry_of_gradient(rect, whole, wire, packed) if batch is not None else None
        if batch is not None and entry is not None and batch.take(entry, whole, packed, *self._decays):
            return
        g = self._piece(whole, rect)
        codec, buffers = self.stored(rect)
        if not codec.row_wise and g.device == packed.device:
            stacks.take(codec, Member(g, buffers, packed), *self._decays)
            return
        with on_device(buffers, packed.device, taken, wait=not self.momentum.layout.pinned) as here:
            self._accumulate(g.to(packed.device, non_blocking=True), codec, here, wire, packed)

    def _accumulate(
        self, g: Tensor, codec: Codec, buffers: Mapping[str, Tensor], wire: WireFormat, packed: Tensor
    ) -> None:
        beta, nesterov = self._decays
        if not codec.row_wise:
            accumulate_pieces(codec, [Member(g, buffers, packed)], wire, beta, nesterov)
            return
        if kernels.usable_on(g.device):
            momentum, out = codec.for_kernels(buffers), wire.for_kernels(packed, *g.shape)
            if kernels.fit(g.shape, momentum, out) and g.stride(1) == 1:
                momentum_kernels.accumulate(g, momentum, out, beta, nesterov)
                return
        g = g.float()
        m = codec.decode(buffers, g.shape[1]).lerp_(g, 1 - beta)
        codec.encode(m, buffers)
        u = g.lerp(m, beta) if nesterov else m
        wire.pack(u.unsqueeze(0), packed.unsqueeze(0))

    def apply(
        self, rect: Rect, wire: WireFormat, packed: Tensor, taken: Tensor | None, batch: ApplyBatch | None
    ) -> None:
        """Decays and updates the rectangle ``rect`` of the parameter."""
        whole = self.shard.weight()
        entry = self._entry_of_weight(rect, whole, wire, packed) if batch is not None else None
        if batch is not None and entry is not None and batch.take(entry, whole, packed, *self.factors):
            return
        part = self._piece(whole, rect)
        with on_device({"weight": part}, packed.device, taken) as here:
            self._apply(here["weight"], wire, packed)

    def _apply(self, weight: Tensor, wire: WireFormat, packed: Tensor) -> None:
        decay, factor = self.factors
        if kernels.usable_on(weight.device):
            encoded = wire.back.for_kernels(packed, *weight.shape)
            if kernels.fit(weight.shape, encoded) and weight.stride(1) == 1:
                momentum_kernels.apply(weight, encoded, decay, factor)
                return
        (update,) = wire.back.unpack(packed.unsqueeze(0), *weight.shape)
        wide = weight.float()  # the weight itself where it is fp32 already
        wide.mul_(decay).add_(update, alpha=factor)
        if wide is not weight:
            weight.copy_(wide)

    @property
    def _decays(self) -> tuple[float, bool]:
        """Of the momentum, and whether it looks ahead."""
        return self.shard.group["momentum"], self.shard.group["nesterov"]

    @property
    def factors(self) -> tuple[float, float]:
        """Of the weight, and of the update that is added."""
        group = self.shard.group
        scale = UPDATE_SCALES[group["update_scale"]](*self.form.outputs_and_inputs(self.index))
        lr = float(group["lr"])
        return 1 - lr * group["weight_decay"], -lr * scale

    def gradient(self, rect: Rect) -> Tensor | None:
        """Of a piece, [rows, cols]; None where there is none."""
        whole = self.shard.gradient()
        return None if whole is None else self._piece(whole, rect)

    def stored(self, rect: Rect) -> tuple[Codec, dict[str, Tensor]]:
        """The momentum of a piece, which is all that this rank has of the matrix: its codec and its buffers."""
        return self.momentum.piece(self.shard.state, self._box(rect))

    def _box(self, rect: Rect) -> Box:
        """Where a piece lies in the tables, of which a flat shard has a part of all of them as one row."""
        flat = self.matrix.geometry.flat
        return self.form.box_of_run(self.index, rect) if flat else self.form.box(self.index, rect)

    @cached_property
    def _here(self) -> Box:
        """What of the tables this rank has."""
        return as_tables(self.shard.region(self.form))

    def _piece(self, whole: Tensor, rect: Rect) -> Tensor:
        """[rows, cols], out of the gradient or weight that this rank has."""
        table, rows, cols = self._box(rect).slices_in(self._here)
        return whole.reshape(self._here.size)[table.start, rows, cols]

    def _entry_of_gradient(self, rect: Rect, whole: Tensor, wire: WireFormat, packed: Tensor) -> Entry | None:
        """Of a piece, for a launch of many; None where kernels take it alone, or not at all."""

        def find() -> Entry | None:
            piece, (codec, buffers) = self._piece(whole, rect), self.stored(rect)
            readers = {whole.device, *map(kernels.reader_of, buffers.values())}
            if not codec.row_wise or readers != {packed.device}:
                return None
            travelling = wire.for_kernels(packed, *piece.shape)
            return Entry.of(whole, piece, packed, travelling, codec.for_kernels(buffers))

        return self._found_once("gradient", rect, whole, self.momentum.addresses(self.shard.state), find)

    def _entry_of_weight(self, rect: Rect, whole: Tensor, wire: WireFormat, packed: Tensor) -> Entry | None:
        """The same for apply."""

        def find() -> Entry | None:
            piece = self._piece(whole, rect)
            if whole.device != packed.device:
                return None
            return Entry.of(whole, piece, packed, wire.back.for_kernels(packed, *piece.shape))

        return self._found_once("weight", rect, whole, (), find)

    def _found_once(
        self, kind: str, rect: Rect, whole: Tensor, stored: tuple[int, ...], find: Callable[[], Entry | None]
    ) -> Entry | None:
        """What ``find`` says, until ``whole`` is laid out otherwise or what is stored lies elsewhere: finding an entry
        costs the host more than all else that it does for a piece."""
        return self._entries[kind, rect].get((whole.device, whole.dtype, whole.stride(), *stored), find)

    @cached_property
    def _entries(self) -> defaultdict[tuple[str, Rect], Memo[Entry | None]]:
        return defaultdict(Memo)


@dataclass(frozen=True)
class MuonWork:
    """The work of one plan, as :class:`muon_dist.pipeline.MatrixWork`; matrices in the plan's order.

    Attributes:
        taken: a bool on the device, whether this step changes state and weights; None: it does. What a step that is not
            taken computes on its way is garbage, and all of it is dropped.
        present: ids of the shards that have a gradient in this step. The others are not updated.
    """

    matrices: Sequence[MuonMatrix]
    wire: WireFormat
    schedule: Schedule
    form: PolarForm
    dtype: torch.dtype | None
    taken: Tensor | None = None
    present: Set[int] = frozenset()

    def updates(self, matrix: int) -> bool:
        """Whether the matrix at a position of the plan is updated in this step."""
        return id(self.matrices[matrix].shard) in self.present

    def accumulate(self, pieces: Sequence[PackedPiece]) -> None:
        batch = batches.AccumulateBatch(self.taken) if pieces and kernels.usable_on(pieces[0].packed.device) else None
        stacks = AccumulateStacks(self.wire, self.taken)
        for matrix, rect, packed in pieces:
            self.matrices[matrix].accumulate(rect, self.wire, packed, self.taken, batch, stacks)
        stacks.launch()
        if batch is not None:
            batch.launch()

    def polar(self, matrices: Tensor, out: Tensor | None) -> Tensor:
        dtype = self.dtype or default_dtype(matrices.device)
        fits = out is not None and out.dtype == dtype
        return polar_factor(matrices, self.schedule, form=self.form, dtype=dtype, out=out if fits else None)

    def apply(self, pieces: Sequence[PackedPiece]) -> None:
        batch = batches.ApplyBatch(self.taken) if pieces and kernels.usable_on(pieces[0].packed.device) else None
        for matrix, rect, packed in pieces:
            if self.updates(matrix):
                self.matrices[matrix].apply(rect, self.wire, packed, self.taken, batch)
        if batch is not None:
            batch.launch()
