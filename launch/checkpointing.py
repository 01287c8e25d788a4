"""The checkpoints of a run: a folder a step, whole or not there at all. What is in one is the engine's."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist

from muon_dist.launch.engines import Engine
from muon_dist.launch.environment import Environment


class Checkpoints:
    """The folder `checkpoints/` of a run."""

    def __init__(self, folder: Path, environment: Environment) -> None:
        self.folder = folder
        self.environment = environment

    def save(self, engine: Engine, step: int) -> None:
        """Written under another name and renamed when whole: no resume ever finds half a checkpoint."""
        final = self.folder / f"step-{step:08d}"
        unfinished = final.with_suffix(".unfinished")
        if self.environment.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        dist.barrier()
        engine.save(unfinished, step)
        if self.environment.is_main:
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
        dist.barrier()

    def newest(self) -> Path | None:
        return max((path for path in self.folder.glob("step-*") if not path.suffix), default=None)

    def load_newest(self, engine: Engine) -> int:
        """The step that the run goes on from; 0 where there is no checkpoint yet."""
        newest = self.newest()
        return 0 if newest is None else engine.load(newest)
