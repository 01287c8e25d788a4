"""Strong and weak scaling of the optimizer step and of whole training steps, beside torch's and DeepSpeed's optimizers.

    for n in 1 2 4 8; do
        torchrun --nproc-per-node $n benchmarks/scaling.py --models llama-8b --at 8 --out scaling.json
    done
    python benchmarks/scaling_plot.py scaling.json --out scaling.png

A job measures on all of its ranks; rows that --out holds already, of other numbers of ranks, are kept and shown with
them. `deepspeed benchmarks/scaling.py ...` and `mpirun -np 8 python benchmarks/scaling.py ...` do as well.

- step-strong: the optimizer step alone on random bf16 shards of the model; step-weak: with n / --at of its layers.
- train-weak: whole steps under FSDP2 with --sequences a rank; train-strong: as many in all as --at ranks would have;
  train-early: as train-weak, with DistMuon alone, whose steps begin during the backward pass.
- zero2, zero3: whole steps under DeepSpeed with --sequences a rank.

"step" is the slowest rank's median. "exposed" is what the same step takes less when the exchange is a local copy.
"sent" is what a rank sends to others inside the optimizer's step, counted at the collectives. "peak" is the most memory
of any rank's tensors, the model and gradients included; "state" is what the optimizer keeps of it. train-early sends a
part of it before, which is not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from job import Job, start
from models import MODELS, Model, random_shards, tokens
from muon_dist.launch.config import UsageError
from muon_dist.memory import measured_state_bytes
from muon_dist.options import MomentumState, Wire
from optimizers import Make, choice
from traffic import Traffic, local_exchange
from training import DEEPSPEED_OPTIMIZERS, EarlyFsdp2, Fsdp2, Trainer, Zero, import_deepspeed

WARMUP = 3
MEASUREMENTS = ("step-strong", "step-weak", "train-strong", "train-weak", "train-early", "zero2", "zero3")
Row = dict[str, Any]


class Bench:
    """Measures steps of one job as the command line says."""

    def __init__(self, job: Job, arguments: argparse.Namespace, traffic: Traffic) -> None:
        self.job = job
        self.arguments = arguments
        self.traffic = traffic

    def rows(self, name: str, measurement: str) -> Iterator[Row]:
        """A row an optimizer."""
        model, part = MODELS[name], self.job.ranks / (self.arguments.at or self.job.ranks)
        if measurement == "step-weak":
            layers, vocabulary = (max(1, round(n * part)) for n in (model.layers, model.vocabulary))
            model = dataclasses.replace(model, layers=layers, vocabulary=vocabulary)
        sequences = self.arguments.sequences
        if measurement == "train-strong":
            sequences = max(1, round(sequences / part))
        of_zero = measurement.startswith("zero")
        makes: Mapping[str, Any] = (
            DEEPSPEED_OPTIMIZERS if of_zero else choice(self.arguments.states, self.arguments.wires)
        )
        for label, make in makes.items():
            if self.arguments.only and not any(part in label for part in self.arguments.only):
                continue
            if measurement == "train-early" and "DistMuon" not in label:
                continue
            self.job.reset_memory()
            row = {"model": name, "measurement": measurement, "optimizer": label, "ranks": self.job.ranks}
            title = " ".join(map(str, row.values()))
            if measurement.startswith("step"):
                row |= self._optimizer_steps(model, make, title)
            else:
                row |= self._training_steps(model, self._trainer(measurement, model, sequences, make), sequences, title)
            yield row

    def _trainer(self, measurement: str, model: Model, sequences: int, make: Any) -> Trainer:
        length, device = self.arguments.length, self.job.device
        if measurement.startswith("zero"):
            return Zero(model, length, sequences, device, make, stage=int(measurement[-1]))
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.arguments.dtype]
        trainer = EarlyFsdp2 if measurement == "train-early" else Fsdp2
        return trainer(model, length, self.job.mesh, device, dtype, make)

    def _optimizer_steps(self, model: Model, make: Make, title: str) -> Row:
        """The optimizer's step alone."""
        optimizers = make(random_shards(model, self.job.mesh, self.job.device))

        def step() -> None:
            for optimizer in optimizers:
                optimizer.step()

        row = self._timed(step, title)
        row["sent_bytes"] = self._sent(step)
        row["peak_gib"] = self.job.peak_gib()
        row["state_gib"] = self.job.maximum(sum(map(measured_state_bytes, optimizers))) / 2**30
        return row

    def _training_steps(self, model: Model, trainer: Trainer, sequences: int, title: str) -> Row:
        """Whole steps, one micro-batch each; bytes are those of the optimizer's step within them."""
        batch = tokens(model, sequences, self.arguments.length, self.job.device)

        def step() -> None:
            trainer.backward(batch)
            trainer.step()

        row = self._timed(step, title)
        row["tokens_per_second"] = 1e3 * self.job.ranks * batch.numel() / row["milliseconds"]
        trainer.backward(batch)
        row["sent_bytes"] = self._sent(trainer.step)
        row["peak_gib"] = self.job.peak_gib()
        trainer.close()
        return row

    def _timed(self, step: Callable[[], None], title: str) -> Row:
        def median() -> float:
            return self.job.median_milliseconds(step, self.arguments.repeats, self.arguments.seconds)

        for _ in range(WARMUP):
            step()
        row = {"milliseconds": median()}
        if self.arguments.trace:
            self._trace(step, title)
        if "DistMuon" in title and self.job.ranks > 1:
            with local_exchange():
                step()
                row["local_milliseconds"] = median()
        return row

    def _sent(self, step: Callable[[], None]) -> float:
        with self.traffic.counting():
            step()
        return self.job.maximum(self.traffic.sent)

    def _trace(self, step: Callable[[], None], title: str) -> None:
        """One step of rank 0 as a Chrome trace."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.job.on_cuda else [])]
        with profile(activities=activities) if self.job.rank == 0 else nullcontext() as profiler:
            step()
            self.job.synchronize()
        if profiler is not None:
            self.arguments.trace.mkdir(parents=True, exist_ok=True)
            name = "".join(c if c.isalnum() else "-" for c in title)
            profiler.export_chrome_trace(str(self.arguments.trace / f"{name}.json"))


def table(rows: list[Row]) -> str:
    """One table a model and measurement. "efficiency" is against the fewest ranks of the same optimizer."""
    lines: list[str] = []
    for model, measurement in dict.fromkeys((row["model"], row["measurement"]) for row in rows):
        lines += ["", f"{model}, {measurement}"]
        lines.append(
            f"{'optimizer':<30}{'ranks':>6}{'step':>12}{'efficiency':>11}{'exposed':>16}{'sent':>13}{'peak':>11}"
            f"{'state':>11}{'tokens/s':>12}"
        )
        chosen_rows = [r for r in rows if (r["model"], r["measurement"]) == (model, measurement)]
        for row in sorted(chosen_rows, key=lambda r: (r["optimizer"], r["ranks"])):
            first = min((r for r in chosen_rows if r["optimizer"] == row["optimizer"]), key=lambda r: r["ranks"])
            speedup = first["milliseconds"] / row["milliseconds"]
            if measurement.endswith("strong"):
                speedup *= first["ranks"] / row["ranks"]
            exposed = f"{'-':>16}"
            if "local_milliseconds" in row:
                hidden = row["milliseconds"] - row["local_milliseconds"]
                exposed = f"{hidden:>7.1f} ms {hidden / row['milliseconds']:>4.0%} "
            speed = row.get("tokens_per_second")
            lines.append(
                f"{row['optimizer']:<30}{row['ranks']:>6}{row['milliseconds']:>9.1f} ms{speedup:>11.0%}{exposed}"
                f"{row['sent_bytes'] / 2**20:>9.1f} MiB{_gib(row['peak_gib'])}{_gib(row.get('state_gib'))}"
                f"{f'{speed:,.0f}' if speed else '-':>12}"
            )
    return "\n".join(lines)


def _gib(value: float | None) -> str:
    return f"{'-':>11}" if value is None else f"{value:>7.2f} GiB"


def arguments_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher gives it
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["nano"])
    parser.add_argument("--measure", nargs="+", choices=MEASUREMENTS, default=["step-strong"])
    parser.add_argument("--at", type=int, help="ranks that the whole model and batch are for (default: all)")
    parser.add_argument("--states", nargs="+", choices=get_args(MomentumState), default=["linear8"])
    parser.add_argument("--wires", nargs="+", choices=get_args(Wire), default=["bf16"])
    parser.add_argument("--only", nargs="+", help="optimizers whose names contain one of these (default: all)")
    parser.add_argument("--repeats", type=int, default=10, help="steps that the median is taken of")
    parser.add_argument("--seconds", type=float, default=5, help="fewer steps, at least 3, if they take longer")
    parser.add_argument("--sequences", type=int, default=4, help="of a micro-batch on a rank")
    parser.add_argument("--length", type=int, default=2048, help="tokens a sequence")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of FSDP2's parameters")
    parser.add_argument("--share-gpu", action="store_true", help="all ranks on the first GPU")
    parser.add_argument("--trace", type=Path, help="write a Chrome trace of one step of each row into this folder")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON, beside those of other jobs")
    return parser.parse_args()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = arguments_of(parser)
    traffic = Traffic()  # before DeepSpeed takes its own references
    try:
        job = start(arguments.share_gpu)
        if any(measurement.startswith("zero") for measurement in arguments.measure):
            import_deepspeed()
    except UsageError as error:
        parser.error(str(error))
    bench = Bench(job, arguments, traffic)
    rows: list[Row] = []
    for name in arguments.models:
        for measurement in arguments.measure:
            for row in bench.rows(name, measurement):
                rows.append(row)
                if job.rank == 0:
                    print(f"{job.ranks} ranks: {name}, {measurement}, {row['optimizer']}", flush=True)
    if job.rank == 0:
        if arguments.out:
            rows = beside_others(rows, arguments.out)
            arguments.out.write_text(json.dumps({"machine": job.machine(), "rows": rows}, indent=2) + "\n")
        print(table(rows))
        print(f"\n{job.machine()}")
    dist.destroy_process_group()


def beside_others(rows: list[Row], file: Path) -> list[Row]:
    """``rows``, and those in ``file`` that they do not replace."""
    keys = ("model", "measurement", "optimizer", "ranks")
    measured = {tuple(row[key] for key in keys) for row in rows}
    written = json.loads(file.read_text())["rows"] if file.exists() else []
    return [row for row in written if tuple(row[key] for key in keys) not in measured] + rows


if __name__ == "__main__":
    main()
