"""Saving and loading a portable checkpoint, beside copying and reading the same bytes on the same disk, in one process.

    python benchmarks/checkpoint.py [--elements 1e9] [--folder FOLDER] [--out checkpoint.json]

- copy: the files of the checkpoint, copied and synced to the disk. save: `save_state`. async_save: until the checkpoint
  is there; "standing still" until training goes on.
- read: these files, from the disk. load: `load_state`, which checks them first. The system's cache of the files is
  dropped before each.
- peak: host memory at its highest, above what the process had before; the state is one of the things that it had.

Times are medians over the repeats, with the lowest and the highest. State lies in host memory. Before each action the
files are copied once more and deleted, so that all find memory for the cache in the same state: a virtual machine gets
it from its host when it is first touched, which takes longer than writing to it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import nn

from muon_dist import DistMuon
from muon_dist.checkpoint import async_save, load_state, save_state
from muon_dist.memory import measured_state_bytes
from muon_dist.options import MomentumState

SHAPE = (2048, 5632)  # of Llama-3.2-1B's kind
_READ_AT_ONCE = 16 << 20  # bytes


def optimizer_of(elements: int, momentum_state: MomentumState) -> DistMuon:
    """Of matrices of about as many elements together, with random codes in its state."""
    count = -(-elements // (SHAPE[0] * SHAPE[1]))
    named = [(f"{i}.weight", nn.Parameter(torch.zeros(SHAPE, dtype=torch.bfloat16))) for i in range(count)]
    optimizer = DistMuon(named, momentum_state=momentum_state)
    for p in optimizer.bound().muon:
        for buffer in p.momentum.buffers(p.shard.state).values():
            buffer.view(torch.uint8).random_(0, 64)
    return optimizer


def copy_synced(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())


def drop_cached(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(_READ_AT_ONCE):
                pass


def _resident(which: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) << 10


def measure(optimizer: DistMuon, folder: Path, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds and bytes of each action; by turns, so that all meet the same disk."""
    saved = folder / "saved"
    save_state(optimizer, saved)
    actions: dict[str, Callable[[Path], object]] = {
        "copy": lambda target: copy_synced(saved, target),
        "save": lambda target: save_state(optimizer, target),
        "async_save, standing still": lambda target: async_save(optimizer, target),
        "async_save": lambda target: async_save(optimizer, target).result(),
        "read": lambda _: read_all(saved),
        "load": lambda _: load_state(optimizer, saved),
    }
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "peak_bytes": []} for name in actions}
    for repeat in range(repeats):
        for name, action in actions.items():
            target = folder / f"{name} {repeat}"
            copy_synced(saved, folder / "first")
            shutil.rmtree(folder / "first")
            if name in ("read", "load"):
                drop_cached(saved)
            os.sync()
            ctypes.CDLL(None).malloc_trim(0)  # what is free is not resident
            Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory is from now on
            before, started = _resident("VmRSS"), time.perf_counter()
            outcome = action(target)
            found[name]["seconds"].append(time.perf_counter() - started)
            found[name]["peak_bytes"].append(_resident("VmHWM") - before)
            if isinstance(outcome, Future):
                outcome.result()
            shutil.rmtree(target, ignore_errors=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=float, default=1e9)
    parser.add_argument("--momentum-state", default="linear8")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; by default one for temporary files")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    optimizer = optimizer_of(int(options.elements), options.momentum_state)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(optimizer, Path(folder), options.repeats)
    matrices, state = optimizer.bound().muon, measured_state_bytes(optimizer)
    largest = max(p.momentum.nbytes for p in matrices)
    print(
        f"{len(matrices)} matrices, {state / 2**20:,.0f} MiB of {options.momentum_state}, {largest / 2**20:,.0f} each"
    )
    medians = {name: statistics.median(entry["seconds"]) for name, entry in found.items()}
    for name, entry in found.items():
        beside = "read" if name in ("read", "load") else "copy"
        ratio, peak = medians[name] / medians[beside], max(entry["peak_bytes"]) / 2**20
        times = f"{medians[name]:7.2f} s ({min(entry['seconds']):.2f} to {max(entry['seconds']):.2f})"
        print(f"{name:28}{times}{ratio:7.2f} x {beside}{peak:8,.0f} MiB")
    if options.out:
        facts = {"state_bytes": state, "largest_bytes": largest, "torch": torch.__version__}
        options.out.write_text(json.dumps({**facts, **found}, indent=2))


if __name__ == "__main__":
    main()
