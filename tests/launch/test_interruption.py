"""A run that is killed or stopped at any moment, while it saves too, goes on and ends as the run that was left alone.

RUNS=50 kills as many runs; the suite is content with fewer.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils._pytree import tree_flatten_with_path

import muon_dist.launch.train  # in the parent: forked ranks have it then
from muon_dist.checkpoint.seal import verify
from muon_dist.launch.config import TrainConfig
from muon_dist.launch.environment import free_port
from muon_dist.launch.interruption import EXIT_CODE
from tests.launch.records import losses, result

RANKS, STEPS = 2, 8
TIMEOUT_SECONDS = 60
RUNS = int(os.environ.get("RUNS", "3"))


def config(out: Path, text: Path, **changes: Any) -> TrainConfig:
    small: dict[str, Any] = {"model": "nano", "sequence_length": 32, "batch_size": 4, "eval_sequences": 2}
    every = {"log_every": 1, "eval_every": STEPS, "checkpoint_every": 1, "keep_checkpoints": 2}
    return TrainConfig(out=out, data=(text,), steps=STEPS, **{**small, **every, **changes})


@contextmanager
def started(run: TrainConfig, ranks: int = RANKS) -> Iterator[list[BaseProcess]]:
    """The ranks of a job, as a launcher would start them, but forked; none of them outlives the block."""
    port, fork = str(free_port()), multiprocessing.get_context("fork")
    job = [fork.Process(target=rank_of, args=(run, rank, ranks, port), daemon=True) for rank in range(ranks)]
    for process in job:
        process.start()
    try:
        yield list(job)
    finally:
        for process in job:
            process.kill()
            process.join()


def rank_of(run: TrainConfig, rank: int, ranks: int, port: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo", CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    os._exit(0 if muon_dist.launch.train.run(run) else EXIT_CODE)


def stop_in_a_save(ranks: list[BaseProcess], checkpoints: Path, moments: random.Random) -> bool:
    """Halts all ranks at a random moment of one of their saves; False if they end first. Each miss is aimed closer."""
    delay = 0.01
    while all(process.is_alive() for process in ranks):
        if list(checkpoints.glob("*.unfinished")):
            time.sleep(moments.uniform(0, delay))
            signal_all(ranks, signal.SIGSTOP)
            if list(checkpoints.glob("*.unfinished")):
                return True
            signal_all(ranks, signal.SIGCONT)
            delay /= 4
        time.sleep(0.0002)
    return False


def signal_all(ranks: list[BaseProcess], number: int) -> None:
    for process in ranks:
        os.kill(process.pid or 0, number)


def exit_codes(ranks: list[BaseProcess]) -> list[int | None]:
    for process in ranks:
        process.join(TIMEOUT_SECONDS)
    return [process.exitcode for process in ranks]


@pytest.fixture(scope="module")
def left_alone(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "left_alone"
    with started(config(out, text_folder)) as ranks:
        assert exit_codes(ranks) == [0] * RANKS
    return out


def final_state(run: Path) -> dict[str, Any]:
    """All that the last checkpoint holds, by its place."""
    dcp_to_torch_save(run / "checkpoints" / f"step-{STEPS:08d}", run / "final.pt")
    leaves, _ = tree_flatten_with_path(torch.load(run / "final.pt", weights_only=False))
    return {str(path): leaf for path, leaf in leaves}


def require_same_end(run: Path, other: Path) -> None:
    """Losses of all steps, weights, state, schedule: bit for bit."""
    assert losses(run, "train") == losses(other, "train")
    assert losses(run, "eval") == losses(other, "eval")
    ours, theirs = final_state(run), final_state(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        same = torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
        assert same, name


def test_killed_runs_end_as_the_run_that_was_left_alone(left_alone: Path, text_folder: Path, tmp_path: Path) -> None:
    """Every other run saves in the background."""
    moments = random.Random(0)
    killed, in_a_save = 0, 0
    for index in range(RUNS):
        out = tmp_path / str(index)
        checkpoints = out / "checkpoints"
        run = config(out, text_folder, resume=True, async_save=index % 2 == 1)
        for kind in ("in a save", "at any moment"):
            with started(run) as ranks:
                if kind == "in a save":
                    in_a_save += stop_in_a_save(ranks, checkpoints, moments)
                else:
                    time.sleep(moments.uniform(0, 1.5))
                killed += all(process.is_alive() for process in ranks)
                for process in moments.sample(ranks, moments.randint(1, RANKS)):  # the others follow
                    process.kill()
            for folder in checkpoints.glob("step-????????"):
                verify(folder, None)
        with started(run) as ranks:
            assert exit_codes(ranks) == [0] * RANKS
        require_same_end(out, left_alone)
        assert len(list(checkpoints.iterdir())) == 2
    print(f"{killed} kills of {RUNS} runs, {in_a_save} of them while a checkpoint was written")
    assert in_a_save


def test_sigterm_saves_and_the_run_goes_on(left_alone: Path, text_folder: Path, tmp_path: Path) -> None:
    """One rank is told; all stop after one step."""
    out = tmp_path / "run"
    rare = config(out, text_folder, checkpoint_every=0, resume=True)
    with started(rare) as ranks:
        metrics = out / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text()):
            time.sleep(0.001)
        os.kill(ranks[1].pid or 0, signal.SIGTERM)
        assert exit_codes(ranks) == [EXIT_CODE] * RANKS
    assert len(list((out / "checkpoints").iterdir())) == 1
    with started(rare) as ranks:
        assert exit_codes(ranks) == [0] * RANKS
    assert result(out)["first_step"] > 1
    require_same_end(out, left_alone)


@pytest.mark.parametrize("ranks", [1, 4])
def test_another_number_of_ranks_goes_on(ranks: int, left_alone: Path, text_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(left_alone, out)
    shutil.rmtree(out / "checkpoints" / f"step-{STEPS:08d}")
    with started(config(out, text_folder, resume=True), ranks) as job:
        assert exit_codes(job) == [0] * ranks
    assert (result(out)["first_step"], result(out)["world_size"]) == (STEPS, ranks)
    assert losses(out, "train") == pytest.approx(losses(left_alone, "train"), rel=1e-4)
    assert losses(out, "eval") == pytest.approx(losses(left_alone, "eval"), rel=1e-4)


def test_a_checkpoint_that_was_damaged_is_put_aside(left_alone: Path, text_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with started(config(out, text_folder)) as ranks:
        assert exit_codes(ranks) == [0] * RANKS
    newest = out / "checkpoints" / f"step-{STEPS:08d}"
    content = bytearray((newest / "__1_0.distcp").read_bytes())
    content[100] ^= 1
    (newest / "__1_0.distcp").write_bytes(content)
    with started(config(out, text_folder, resume=True)) as ranks:
        assert exit_codes(ranks) == [0] * RANKS
    assert result(out)["first_step"] == STEPS
    assert newest.with_suffix(".damaged").exists()
    require_same_end(out, left_alone)


def test_torchrun_restarts_a_run_that_was_stopped(left_alone: Path, text_folder: Path, tmp_path: Path) -> None:
    """Without --resume: torchrun says that it is a restart."""
    out = tmp_path / "run"
    options = f"--out {out} --data {text_folder} --model nano --sequence-length 32 --batch-size 4 --eval-sequences 2"
    options += f" --log-every 1 --steps {STEPS} --eval-every {STEPS} --checkpoint-every 1 --keep-checkpoints 2"
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node={RANKS} --max-restarts=2 -m muon_dist.launch"
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, *torchrun.split(), "train", *options.split()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        job = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not list((out / "checkpoints").glob("step-????????")) and time.monotonic() < deadline:
            time.sleep(0.01)
        workers = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True).stdout
        os.kill(int(workers.split()[0]), signal.SIGTERM)
        assert job.wait(TIMEOUT_SECONDS) == 0, (tmp_path / "log").read_text()
    finally:
        if job.poll() is None:
            job.terminate()  # torchrun ends its workers then
            job.wait(TIMEOUT_SECONDS)
    assert result(out)["first_step"] > 1
    require_same_end(out, left_alone)
