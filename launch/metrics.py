"""What a run shows and writes down as it goes: a progress bar, metrics.jsonl, TensorBoard and W&B, all from rank 0."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


def peak_memory_bytes(device: torch.device) -> int:
    """The most this process has held so far: on the GPU where there is one, else resident in host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole records; a killed job may have left a cut last line."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Metrics:
    """One record a line: `{"kind": "train" | "eval" | "optimizer", "step": ..., ...}`. A disabled one (other ranks)
    does nothing.

    Args:
        wandb_project: of W&B; "" for none.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        first_step: int,
        steps: int,
        enabled: bool,
        wandb_project: str = "",
    ) -> None:
        self.device = device
        self.enabled = enabled
        self.progress = tqdm(total=steps, initial=first_step - 1, unit="step", mininterval=0.5, disable=not enabled)
        self._tokens = 0
        self._since = time.perf_counter()
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        # Steps after the checkpoint that a resumed run starts from are run again, and recorded again.
        kept = [record for record in read_records(path) if record["step"] < first_step] if path.exists() else []
        self.file = path.open("w", buffering=1)
        for record in kept:
            self.file.write(json.dumps(record) + "\n")
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        self.wandb: Any = None
        if wandb_project:
            import wandb

            self.wandb = wandb.init(project=wandb_project, dir=folder, name=folder.resolve().name)

    def advance(self, tokens: int) -> None:
        self._tokens += tokens
        self.progress.update()

    def train(self, step: int, loss: float, lr: float, grad_norm: float) -> None:
        now = time.perf_counter()
        tokens_per_second = self._tokens / (now - self._since)
        self._tokens, self._since = 0, now
        memory = peak_memory_bytes(self.device)
        self.progress.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s, {memory / 2**20:,.0f} MiB")
        self._record(
            "train",
            step,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_second=tokens_per_second,
            memory_bytes=memory,
        )

    def evaluation(self, step: int, loss: float) -> None:
        if self.enabled:
            self.progress.write(f"step {step}: validation loss {loss:.4f} nats/byte")
        self._record("eval", step, loss=loss)

    def optimizer(self, step: int, statistics: Mapping[str, torch.Tensor]) -> None:
        """What :class:`muon_dist.statistics.Observer` saw; waits for the device."""
        self._record("optimizer", step, **{name: float(value) for name, value in statistics.items()})

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Around what isn't training (evaluation, checkpoints), so that tokens/s stays the training's own."""
        started = time.perf_counter()
        yield
        self._since += time.perf_counter() - started

    def _record(self, kind: str, step: int, **values: float) -> None:
        if not self.enabled:
            return
        self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        for name, value in values.items():
            self.tensorboard.add_scalar(f"{kind}/{name}", value, step)
        if self.wandb is not None:
            self.wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self.progress.close()
        if self.enabled:
            self.file.close()
            self.tensorboard.close()
            if self.wandb is not None:
                self.wandb.finish()
