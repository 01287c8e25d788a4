"""Wire formats: how the elements of a piece travel between ranks, as bytes.

What comes back takes as many bytes as what went out. Polar factors have no element above one, so where elements take
two bytes they are bf16 on the way out, for its range, and fp16 on the way back, for its three more digits.

Each piece starts at a multiple of 16 bytes, so that its bytes can be read as any dtype where they arrive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from muon_dist import kernels
from muon_dist.codecs import Codec, make_codec
from muon_dist.kernels import Encoded
from muon_dist.options import Wire

if kernels.HAS_TRITON:
    from muon_dist.kernels import recode

_ALIGNMENT = 16
# Elements that share a scale. A piece is encoded where it is cut, so they need not match the momentum's.
_BLOCK = 128
_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class WireFormat(Protocol):
    """Turns pieces, ``[..., rows, cols]``, into bytes, uint8 ``[..., nbytes(rows, cols)]``, and back. The bytes of one
    piece lie together."""

    @property
    def dtype(self) -> torch.dtype:
        """What pieces are unpacked as. Codes have fewer digits than bf16."""

    @property
    def back(self) -> WireFormat:
        """The format of what comes back."""

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes that one piece takes in the buffer."""

    def view(self, packed: Tensor, rows: int, cols: int) -> Tensor | None:
        """The bytes of ``packed`` as ``[..., rows, cols]`` to be read and written, if they are plain numbers."""

    def for_kernels(self, packed: Tensor, rows: int, cols: int) -> Encoded:
        """One piece (uint8 ``[nbytes]``) as kernels take it."""

    def pack(self, pieces: Tensor, out: Tensor) -> None:
        """Writes ``pieces`` (``[..., rows, cols]``, floating point) into ``out`` (uint8 ``[..., nbytes]``)."""

    def unpack(self, packed: Tensor, rows: int, cols: int, out: Tensor | None = None) -> Tensor:
        """What lies in ``packed`` (uint8 ``[..., nbytes]``) as ``[..., rows, cols]``: in ``out``, of any floating-point
        type, or else in ``dtype``, maybe as a view."""


@dataclass(frozen=True)
class FloatWire:
    """Elements as they are, in fp32 (exact), bf16 or fp16."""

    dtype: torch.dtype

    @property
    def back(self) -> WireFormat:
        return FloatWire(torch.float16) if self.dtype == torch.bfloat16 else self

    def nbytes(self, rows: int, cols: int) -> int:
        return _aligned(rows * cols * self.dtype.itemsize)

    def for_kernels(self, packed: Tensor, rows: int, cols: int) -> Encoded:
        return self._encoded(packed.view(self.dtype)[: rows * cols])

    def pack(self, pieces: Tensor, out: Tensor) -> None:
        there = self.view(out, *pieces.shape[-2:])
        if _fits_recode(pieces):  # faster than torch's copies with strides
            recode.encode(pieces, self._encoded(there))
        else:
            there.copy_(pieces)

    def unpack(self, packed: Tensor, rows: int, cols: int, out: Tensor | None = None) -> Tensor:
        there = self.view(packed, rows, cols)
        if out is None:
            return there
        if _fits_recode(out):
            recode.decode(self._encoded(there), out)
            return out
        return out.copy_(there)

    def view(self, packed: Tensor, rows: int, cols: int) -> Tensor:
        return packed.view(self.dtype)[..., : rows * cols].unflatten(-1, (rows, cols))

    def _encoded(self, numbers: Tensor) -> Encoded:
        return Encoded(_FORMATS[self.dtype], {"": numbers})


@dataclass(frozen=True)
class EncodedWire:
    """Elements through a row-wise codec, its buffers one behind the other: int8 takes half the bytes of bf16, at an
    error of about 1%, and nf4 a quarter, at 10%."""

    codec: Codec

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    @property
    def back(self) -> WireFormat:
        return self

    def nbytes(self, rows: int, cols: int) -> int:
        return sum(_aligned(spec.nbytes) for spec in self.codec.buffers((rows, cols)).values())

    def for_kernels(self, packed: Tensor, rows: int, cols: int) -> Encoded:
        return self.codec.for_kernels(self._buffers(packed, rows, cols))

    def pack(self, pieces: Tensor, out: Tensor) -> None:
        count = _at_a_time(out)
        for some, packed in zip(pieces.split(count), out.split(count), strict=True):
            self.codec.encode(some, self._buffers(packed, *pieces.shape[-2:]))

    def unpack(self, packed: Tensor, rows: int, cols: int, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty((*packed.shape[:-1], rows, cols), dtype=self.dtype, device=packed.device)
        count = _at_a_time(packed)
        for some, encoded in zip(out.split(count), packed.split(count), strict=True):
            self.codec.decode(self._buffers(encoded, rows, cols), cols, out=some)
        return out

    def view(self, packed: Tensor, rows: int, cols: int) -> None:
        return None

    def _buffers(self, packed: Tensor, rows: int, cols: int) -> dict[str, Tensor]:
        """The codec's buffers inside the bytes of pieces."""
        buffers, start = {}, 0
        for name, spec in self.codec.buffers((rows, cols)).items():
            buffers[name] = packed[..., start : start + spec.nbytes].view(spec.dtype).unflatten(-1, spec.shape)
            start += _aligned(spec.nbytes)
        return buffers


def wire_format(name: Wire) -> WireFormat:
    """The wire format called ``name``."""
    if name == "int8":
        return EncodedWire(make_codec("linear8", _BLOCK))
    if name == "nf4":
        return EncodedWire(make_codec("nf4", _BLOCK))
    return FloatWire(torch.float32 if name == "fp32" else torch.bfloat16)


def _fits_recode(pieces: Tensor) -> bool:
    return kernels.usable_on(pieces.device) and pieces.ndim == 4 and pieces.numel() > 0 and pieces.stride(-1) == 1


def _at_a_time(packed: Tensor) -> int:
    """Pieces to encode or decode: one on CPU, so that what is fp32 meanwhile stays small; kernels take all at once."""
    return 1 if packed.device.type == "cpu" else max(1, len(packed))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
