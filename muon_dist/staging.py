"""Brings tensors to where they are computed, and what was written there back: for offloaded parameters, and for steps
that may turn out not to be taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def on_device(
    tensors: Mapping[str, Tensor], device: torch.device, taken: Tensor | None = None, wait: bool = True
) -> Iterator[Mapping[str, Tensor]]:
    """The tensors on ``device``, to be read and written: themselves where they lie there, else copies whose content is
    copied back at the end.

    Args:
        taken: a bool on ``device``, whether what is written stays; then all are copies. None: it stays.
        wait: whether copying back to the host waits for the device, so that the host may read right away.
    """
    before = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    here = before if taken is None else {name: tensor.clone() for name, tensor in before.items()}
    yield here
    for name, tensor in tensors.items():
        if here[name] is not tensor:
            tensor.copy_(
                here[name] if taken is None else torch.where(taken, here[name], before[name]), non_blocking=not wait
            )
