"""Runs a function on several ranks of a gloo job, quickly: processes are forked from one that has torch already.

A rank that fails ends the whole job at once and its traceback becomes the test's failure; a job that hangs is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer step imports it: 2 s a process unless the parent has
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.tensor


def run_ranks(ranks: int, function: Callable[[int], Any], timeout: float = 60.0) -> list[Any]:
    """Calls ``function(rank)`` on every rank of a new job and returns what each returned (picklable).

    Raises:
        AssertionError: a rank raised, with its traceback; or the job did not end in ``timeout`` seconds.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        processes = [
            context.Process(target=_run, args=(rank, ranks, function, Path(folder) / "store", send), daemon=True)
            for rank, (_, send) in enumerate(pipes)
        ]
        for process, (_, send) in zip(processes, pipes, strict=True):
            process.start()
            send.close()
        try:
            return _collect([receive for receive, _ in pipes], time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(receivers: Sequence[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        pending = [r for rank, r in enumerate(receivers) if rank not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        missing = sorted(set(range(len(receivers))) - set(results))
        assert ready, f"ranks {missing} did not finish in time: do all ranks issue the same collectives?"
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = receivers.index(receiver)
            try:
                ok, value = receiver.recv()
            except EOFError:
                ok, value = False, "the process died"
            assert ok, f"rank {rank} failed:\n{value}"
            results[rank] = value
    return [results[rank] for rank in range(len(receivers))]


def _run(rank: int, ranks: int, function: Callable[[int], Any], store: Path, send: Connection) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        message = pickle.dumps((True, function(rank)))
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    send.send_bytes(message)
    send.close()
    # Until the parent ends it: a peer may still be shaking hands with this one, or be stuck in a collective.
    while True:
        signal.pause()
