"""DistMuon beside DeepSpeed's own Muon and AdamW, at ZeRO stages 2 and 3: bytes sent, state, time, memory, loss.

    torchrun --nproc-per-node 4 benchmarks/zero.py [--steps 5] [--out zero.json]

Ranks are processes on CPU (gloo), or on GPUs; ranks that share one GPU are told apart by ``--share-gpu``. "sent" is
what a rank sends to others inside ``engine.step()``, counted at each collective; at stage 2 that includes ZeRO's own
all-gather of the weights, at stage 3 there is none. "momentum" is what a rank keeps between steps for each of the
elements of the matrices that it would hold if they were cut evenly, DeepSpeed's staging copy included.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

if not torch.cuda.is_available():
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # DeepSpeed's Muon compiles itself, for minutes on CPU
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")

SIZES = {  # vocabulary, hidden, intermediate, layers, sequence length, sequences a rank
    "nano": (256, 256, 688, 4, 64, 2),
    "135m": (32000, 768, 2048, 12, 512, 8),
}
DIST_MUON = {"type": "DistMuon", "params": {"lr": 5e-3, "weight_decay": 0.0, "adamw_lr": 3e-4}}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "DistMuon, linear8, bf16 wire": DIST_MUON,
    "DistMuon, linear8, int8 wire": {**DIST_MUON, "params": {**DIST_MUON["params"], "wire": "int8"}},
    "DeepSpeed's Muon": {"type": "Muon", "params": {"muon_lr": 5e-3, "adam_lr": 3e-4, "torch_adam": True}},
    "AdamW": {"type": "AdamW", "params": {"lr": 3e-4, "torch_adam": True}},
}


class Traffic:
    """Bytes that this rank sends to others, counted at torch.distributed's collectives while ``counting()``.

    Ring algorithms are assumed where the library chooses: (W - 1) / W of the whole for a gather or a scatter, twice
    that for an all-reduce.
    """

    def __init__(self) -> None:
        self.sent = 0
        self._counting = False
        self._count("all_gather_into_tensor", lambda out, given, **_: _nbytes(out) - _nbytes(given))
        self._count("all_gather", lambda outs, given, **_: sum(map(_nbytes, outs)) - _nbytes(given))
        self._count("reduce_scatter_tensor", lambda out, given, **_: _nbytes(given) - _nbytes(out))
        self._count("all_reduce", lambda tensor, *_, **__: 2 * _nbytes(tensor) * (_ranks() - 1) // _ranks())
        self._count("all_to_all_single", _sent_by_all_to_all)

    @contextmanager
    def counting(self) -> Iterator[None]:
        self.sent, self._counting = 0, True
        yield
        self._counting = False

    def _count(self, name: str, sent: Callable[..., int]) -> None:
        collective = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._counting:
                tensors = {k: v for k, v in kwargs.items() if k in _POSITIONAL}
                self.sent += sent(*args, *tensors.values(), **{k: v for k, v in kwargs.items() if k not in tensors})
            return collective(*args, **kwargs)

        setattr(dist, name, counted)


# Arguments that DeepSpeed gives by name, in the collectives' order.
_POSITIONAL = ("output_tensor", "tensor_list", "output", "tensor", "input_tensor", "input")


def _nbytes(tensor: Tensor) -> int:
    return tensor.nbytes


def _ranks() -> int:
    return dist.get_world_size()


def _sent_by_all_to_all(out: Tensor, given: Tensor, out_splits: Any = None, in_splits: Any = None, **_: Any) -> int:
    own = in_splits[dist.get_rank()] * given.element_size() if in_splits else given.nbytes // _ranks()
    return given.nbytes - own


def text_batches(size: str, device: torch.device) -> Iterator[Tensor]:
    """Windows of the Python standard library's bytes, others on every rank."""
    *_, length, sequences = SIZES[size]
    folder = Path(os.__file__).parent
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(dist.get_rank())
    while True:
        starts = torch.randint(len(tokens) - length, (sequences,), generator=generator)
        yield torch.stack([tokens[s : s + length] for s in starts.tolist()]).long().to(device)


def measure(
    optimizer: dict[str, Any], stage: int, size: str, steps: int, traffic: Traffic, device: torch.device
) -> dict[str, Any]:
    """Trains a fresh model for ``steps`` steps; figures of rank 0, times as medians over the second half."""
    import deepspeed

    import muon_dist.integrations.deepspeed  # noqa: F401 (registers)
    from muon_dist.memory import measured_state_bytes

    vocabulary, hidden, intermediate, layers, _, sequences = SIZES[size]
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
        )
    )
    zero: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    if stage == 3 and optimizer["type"] == "Muon":
        zero["reduce_scatter"] = False  # it refuses anything else
    config = {
        "train_micro_batch_size_per_gpu": sequences,
        "zero_optimization": zero,
        "optimizer": optimizer,
        "gradient_clipping": 0.0,  # DeepSpeed's Muon would clip the orthogonal update
        "bf16": {"enabled": True},
    }
    parameters = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    losses, whole, inside = [], [], []
    batches = text_batches(size, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        tokens = next(batches)
        _synchronize(device)
        started = time.perf_counter()
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        _synchronize(device)
        middle = time.perf_counter()
        with traffic.counting():
            engine.step()
        _synchronize(device)
        ended = time.perf_counter()
        whole.append(ended - started)
        inside.append(ended - middle)
        losses.append(loss.item())
    figures = {
        "parameters": parameters,
        "sent_bytes": traffic.sent,
        "sent_per_matrix_element": traffic.sent / matrices,
        "state_bytes": measured_state_bytes(engine.basic_optimizer) + staging_bytes(engine.optimizer),
        "momentum_bytes_per_element": (momentum_bytes(engine.basic_optimizer) + staging_bytes(engine.optimizer))
        / (matrices / _ranks()),
        "step_ms": 1e3 * statistics.median(inside[steps // 2 :]),
        "whole_ms": 1e3 * statistics.median(whole[steps // 2 :]),
        "peak_gib": (torch.cuda.max_memory_allocated() - before) / 2**30 if device.type == "cuda" else None,
        "losses": losses,
    }
    engine.destroy()
    return figures


def momentum_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the entries of the state that hold momentum, ours or DeepSpeed's."""
    entries = [item for state in optimizer.state.values() for item in state.items()]
    return sum(value.nbytes for key, value in entries if "momentum" in key)


def staging_bytes(engine_optimizer: Any) -> int:
    """Of the copy of the momentum that DeepSpeed's Muon keeps at stages 1 and 2."""
    return sum(staged.nbytes for staged, _ in getattr(engine_optimizer, "_muon_pending_momentum", {}).values())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def table(stage: int, figures: dict[str, dict[str, Any]]) -> str:
    header = f"{'optimizer':<30}{'sent in step':>21}{'momentum':>13}{'state':>13}"
    lines = [f"ZeRO-{stage}", f"{header}{'step':>11}{'whole':>11}{'peak':>11}{'loss':>15}"]
    for name, f in figures.items():
        peak = f"{f['peak_gib']:>7.2f} GiB" if f["peak_gib"] else f"{'-':>11}"
        lines.append(
            f"{name:<30}{f['sent_bytes'] / 2**20:>8.2f} MiB {f['sent_per_matrix_element']:>5.2f} B/e"
            f"{f['momentum_bytes_per_element']:>9.3f} B/e{f['state_bytes'] / 2**20:>9.2f} MiB"
            f"{f['step_ms']:>8.1f} ms{f['whole_ms']:>8.1f} ms{peak}{f['losses'][0]:>8.2f}{f['losses'][-1]:>7.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="nano")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--share-gpu", action="store_true", help="all ranks on the first GPU")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    arguments = parser.parse_args()

    local_rank = int(os.environ["LOCAL_RANK"])
    if arguments.share_gpu:
        os.environ["NCCL_HOSTID"] = f"host{local_rank}"  # NCCL refuses two ranks of one host on one GPU
        os.environ["LOCAL_RANK"] = "0"
        local_rank = 0
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    traffic = Traffic()  # before DeepSpeed takes its own references
    dist.init_process_group("nccl" if on_cuda else "gloo")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # built for minutes, and not used here
    results = {}
    for stage in arguments.stages:
        figures = {}
        for name, optimizer in OPTIMIZERS.items():
            figures[name] = measure(optimizer, stage, arguments.size, arguments.steps, traffic, device)
            gc.collect()
            if on_cuda:
                torch.cuda.empty_cache()
        results[f"ZeRO-{stage}"] = figures
        if dist.get_rank() == 0:
            print(table(stage, figures), flush=True)
    if dist.get_rank() == 0:
        machine = {
            "device": torch.cuda.get_device_name() if on_cuda else "cpu",
            "ranks": dist.get_world_size(),
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "python": platform.python_version(),
        }
        print(machine)
        if arguments.out:
            arguments.out.write_text(json.dumps({"machine": machine, "figures": results}, indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
