"""The engine of `--engine deepspeed`: a DeepSpeed engine, at the ZeRO stage and with the optimizer of the JSON file."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from muon_dist.launch.config import TrainConfig, UsageError
from muon_dist.launch.engines import Engine, Write
from muon_dist.launch.optimizers import warmup_cosine


def import_deepspeed() -> Any:
    """DeepSpeed, with DistMuon known to it."""
    if not torch.cuda.is_available():
        # Read at import; without it DeepSpeed warns that it has to guess.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        from muon_dist.integrations.deepspeed import register
    except ImportError as error:
        raise UsageError(f"--engine deepspeed: {error}") from None
    import deepspeed

    register()
    # On CPU every start would first compile this op, an all-reduce through shared memory, for minutes and with a
    # compiler that may not be there; gloo does the same. There is no option that says so.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class DeepSpeedEngine(Engine):
    def __init__(self, config: TrainConfig, model: LlamaForCausalLM, ds_config: Mapping[str, Any]) -> None:
        # DeepSpeed reads it from here alone; a job of one has no launcher that set it.
        os.environ.setdefault("LOCAL_RANK", "0")
        self._deepspeed = import_deepspeed()
        self.model: Any
        self.model, *_ = self._deepspeed.initialize(
            model=model,
            model_parameters=model.parameters(),
            config=copy.deepcopy(dict(ds_config)),  # DeepSpeed writes into it
            # Stepped by the engine, but not after steps that it skips because of an overflow.
            lr_scheduler=lambda optimizer: warmup_cosine(optimizer, config.warmup_steps, config.steps),
        )
        self.optimizers = [self.model.basic_optimizer]

    @contextmanager
    def micro_batch(self, *, is_last: bool) -> Iterator[None]:
        yield
        if not is_last:
            self.model.step()  # only counts: DeepSpeed updates after its gradient_accumulation_steps

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)  # divides by gradient_accumulation_steps

    def step(self) -> Tensor | float:
        if self.model.zero_optimization_stage() == 0:
            # DeepSpeed tells the norm only of gradients that ZeRO has sharded. These are whole and already reduced.
            norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
            self.model.step()
            return norm
        self.model.step()
        sharded_norm: Tensor | float | None = self.model.get_global_grad_norm()
        return math.nan if sharded_norm is None else sharded_norm  # the file can say "compute_grad_norm": false

    def writer(self, step: int) -> Write:
        return lambda folder, _: self.model.save_checkpoint(str(folder), client_state={"step": step})

    def load(self, folder: Path) -> int:
        path, client_state = self.model.load_checkpoint(str(folder))
        if path is None:
            raise UsageError(
                f"--resume: {folder} is no checkpoint of DeepSpeed's; resume with the engine that wrote it"
            )
        step: int = client_state["step"]
        return step

    def close(self) -> None:
        self.model.destroy()
        self._deepspeed.comm.destroy_process_group()  # torch's own would leave the references that DeepSpeed keeps
