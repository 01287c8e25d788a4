"""Bytes that a rank sends, counted at torch.distributed's collectives; and the exchange replaced by a local copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Names under which engines give the tensors of collectives, in the collectives' order.
_TENSORS = ("output_tensor", "tensor_list", "output", "tensor", "input_tensor", "input")


class Traffic:
    """Bytes that this rank sends to others, counted while ``counting()``.

    Ring algorithms are assumed where the library chooses: (W - 1) / W of the whole for a gather or a scatter, twice
    that for an all-reduce. Make it before an engine is imported that takes references of its own.
    """

    def __init__(self) -> None:
        self.sent = 0
        self._counting = False
        self._count("all_gather_into_tensor", lambda ranks, out, given, *_: _nbytes(out) - _nbytes(given))
        self._count("all_gather", lambda ranks, outs, given, *_: sum(map(_nbytes, outs)) - _nbytes(given))
        self._count("reduce_scatter_tensor", lambda ranks, out, given, *_: _nbytes(given) - _nbytes(out))
        self._count("all_reduce", lambda ranks, tensor, *_: 2 * _nbytes(tensor) * (ranks - 1) // ranks)
        self._count("all_to_all_single", _sent_by_all_to_all)

    @contextmanager
    def counting(self) -> Iterator[None]:
        self.sent, self._counting = 0, True
        yield
        self._counting = False

    def _count(self, name: str, sent: Callable[..., int]) -> None:
        collective = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._counting:
                tensors = [value for key, value in kwargs.items() if key in _TENSORS]
                self.sent += sent(dist.get_world_size(kwargs.get("group")), *args, *tensors)
            return collective(*args, **kwargs)

        setattr(dist, name, counted)


@contextmanager
def local_exchange() -> Iterator[None]:
    """Has all_to_all_single copy what this rank would send into what it would receive: the same buffers are read and
    written in the same order, and nothing travels. What a step costs more without it is exposed communication."""
    collective = dist.all_to_all_single

    def copied(received: Tensor, given: Tensor, *_: Any, **__: Any) -> _Copied:
        shared = min(received.numel(), given.numel())
        received[:shared].copy_(given[:shared])
        received[shared:].zero_()
        return _Copied(received.device)

    setattr(dist, "all_to_all_single", copied)  # noqa: B010 - of another signature
    yield
    setattr(dist, "all_to_all_single", collective)  # noqa: B010


class _Copied:
    """Stands for the collective: the stream that waits, waits for the copy."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.get_device_module(device).Event()
        self._event.record(torch.get_device_module(device).current_stream(device))

    def wait(self) -> None:
        self._event.wait()


def _nbytes(tensor: Tensor) -> int:
    return tensor.nbytes


def _sent_by_all_to_all(
    ranks: int, out: Tensor, given: Tensor, out_splits: Any = None, in_splits: Any = None, *_: Any
) -> int:
    own = in_splits[dist.get_rank()] * given.element_size() if in_splits else given.nbytes // ranks
    return given.nbytes - own
