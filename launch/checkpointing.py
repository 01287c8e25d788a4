"""Checkpoints of a run through torch.distributed.checkpoint: a folder a step, whole or not there at all."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from muon_dist.launch.environment import Environment


class TrainingState(Stateful):
    """All that a resumed run needs. The data's order is a function of seed and step, so the step stands for it."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], schedulers: Sequence[LRScheduler]) -> None:
        self.model = model
        self.optimizers = optimizers
        self.schedulers = schedulers
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizers)
        schedulers = [scheduler.state_dict() for scheduler in self.schedulers]
        return {"model": model, "optimizer": optimizer, "schedulers": schedulers, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizers,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
        )
        for scheduler, state in zip(self.schedulers, state_dict["schedulers"], strict=True):
            scheduler.load_state_dict(state)
        self.step = state_dict["step"]


class Checkpoints:
    """The folder `checkpoints/` of a run."""

    def __init__(self, folder: Path, environment: Environment) -> None:
        self.folder = folder
        self.environment = environment

    def save(self, state: TrainingState) -> None:
        """Written under another name and renamed when whole: no resume ever finds half a checkpoint."""
        final = self.folder / f"step-{state.step:08d}"
        unfinished = final.with_suffix(".unfinished")
        if self.environment.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        dist.barrier()
        dcp.save({"training": state}, checkpoint_id=unfinished)
        if self.environment.is_main:
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
        dist.barrier()

    def newest(self) -> Path | None:
        return max((path for path in self.folder.glob("step-*") if not path.suffix), default=None)

    def load_newest(self, state: TrainingState) -> None:
        newest = self.newest()
        if newest is not None:
            dcp.load({"training": state}, checkpoint_id=newest)
