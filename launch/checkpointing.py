"""The checkpoints of a run: a folder a step, whole or not there at all. What is in one is the engine's."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed as dist

from muon_dist.checkpoint.seal import UNFINISHED, begin, finish, is_finished, verify
from muon_dist.launch.engines import Engine
from muon_dist.launch.environment import Environment

DAMAGED = ".damaged"


class Checkpoints:
    """The folder `checkpoints/` of a run, and the newest `keep` of them in it."""

    def __init__(self, folder: Path, keep: int, environment: Environment) -> None:
        self.folder = folder
        self.keep = keep
        self.environment = environment

    def save(self, engine: Engine, step: int) -> None:
        folder = self.folder / f"step-{step:08d}"
        unfinished = begin(folder, dist.group.WORLD)
        engine.save(unfinished, step)
        finish(unfinished, folder, {"step": step, "world_size": self.environment.world_size}, dist.group.WORLD)
        if self.environment.is_main:
            self._prune()

    def load_newest(self, engine: Engine) -> int:
        """The step that the run goes on from; 0 where there is no checkpoint yet.

        One that was damaged since it was written is put aside, under a name that says so, and the one before it taken.
        """
        for folder in reversed(self._finished()):
            try:
                verify(folder, dist.group.WORLD)
            except ValueError as error:
                if self.environment.is_main:
                    print(error)
                    folder.rename(folder.with_suffix(DAMAGED))
                continue
            return engine.load(folder)
        return 0

    def _finished(self) -> list[Path]:
        """From the oldest to the newest."""
        return sorted(path for path in self.folder.glob("step-*") if not path.suffix and is_finished(path))

    def _prune(self) -> None:
        """Old ones lose their name before they are deleted, so that no half of one is taken for a checkpoint."""
        for folder in self._finished()[: -self.keep]:
            folder.rename(folder.with_suffix(UNFINISHED))
        for folder in self.folder.glob(f"*{UNFINISHED}"):
            shutil.rmtree(folder)
