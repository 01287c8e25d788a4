"""Accelerate shards on CPU ranks too: imported for its effect, by tests of FSDP2 under Accelerate and the Trainer.

Accelerate looks at FSDP's settings only where it has found several GPUs; on CPU ranks it replicates instead. Told that
it has, it runs the same code there.
"""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_init = AcceleratorState.__init__


def _init_as_on_gpus(self: AcceleratorState, *arguments: Any, **options: Any) -> None:
    PartialState(cpu=True)
    if not AcceleratorState._shared_state:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    _init(self, *arguments, **options)


AcceleratorState.__init__ = _init_as_on_gpus
