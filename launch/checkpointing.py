"""The checkpoints of a run: a folder a step, whole or not there at all. What is in one is the engine's."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import torch.distributed as dist

from muon_dist.checkpoint.background import Background
from muon_dist.checkpoint.seal import UNFINISHED, begin, finish, is_finished, verify
from muon_dist.launch.engines import Engine, Write
from muon_dist.launch.environment import Environment

DAMAGED = ".damaged"


class Checkpoints:
    """The folder `checkpoints/` of a run, and the newest `keep` of them in it.

    In the background, saving returns when there is a copy of the state in host memory; the next save, or `wait`, waits
    until it is written, and raises what went wrong.
    """

    def __init__(self, folder: Path, keep: int, environment: Environment, in_background: bool) -> None:
        self.folder = folder
        self.keep = keep
        self.environment = environment
        self._background = Background(dist.group.WORLD) if in_background else None

    def save(self, engine: Engine, step: int) -> None:
        self.wait()
        folder = self.folder / f"step-{step:08d}"
        unfinished = begin(folder, dist.group.WORLD)
        if self._background is None:
            self._write(engine.writer(step), unfinished, folder, step, dist.group.WORLD)
        else:
            self._background.start(partial(self._write, engine.copied_writer(step), unfinished, folder, step))

    def wait(self) -> None:
        if self._background is not None:
            self._background.wait()

    def _write(self, write: Write, unfinished: Path, folder: Path, step: int, group: dist.ProcessGroup | None) -> None:
        write(unfinished, group)
        finish(unfinished, folder, {"step": step, "world_size": self.environment.world_size}, group)
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
