"""DeepSpeed without the kernel that it compiles for CPUs: imported for its effect, before DeepSpeed is initialised.

``deepspeed_shm_comm`` is built when the process group is, for minutes unless it is cached, and gloo does as well.
DeepSpeed has no setting for it.
"""

from __future__ import annotations

import deepspeed
import torch

if not torch.cuda.is_available():
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
