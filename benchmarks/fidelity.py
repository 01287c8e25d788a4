"""Does quantised momentum train like fp32? The same model, data and seeds through every way of storing it.

    python benchmarks/fidelity.py --learning-rates 0.01 0.007 0.02 --jobs 3     # 65M parameters, 2000 steps, 3 seeds
    python benchmarks/fidelity.py --model nano --steps 60 --seeds 1 --batch-size 8 --sequence-length 64     # on CPU

Trains Llamas on the bytes of the Python standard library, or of ``--data``. All Muon arms use the learning rate that is
best for fp32 Muon with the first seed. An arm's gap is its final validation loss less that of its reference with the
same seed (fp32 Muon, or fp32 AdamW), in nats a byte; the table gives the mean over seeds and its standard error. Runs
are shared out over all GPUs, ``--jobs`` at a time on each; those that ``--out`` holds already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import nn

from adamw8 import BlockwiseAdamW
from muon_dist import DistMuon
from muon_dist.launch.config import ModelName, TrainConfig
from muon_dist.launch.data import Batches, TextData, load_text
from muon_dist.launch.environment import Environment, read_environment
from muon_dist.launch.models import build_model
from muon_dist.launch.optimizers import warmup_cosine

EVALUATIONS = 4
EVAL_SEQUENCES = 1024
CLIP_NORM = 1.0


@dataclass(frozen=True)
class Arm:
    """One way of storing the state: which optimizer, and its options."""

    label: str
    options: dict[str, Any] = field(hash=False)
    reference: str = "fp32"

    def build(self, model: nn.Module, lr: float, adamw_lr: float) -> torch.optim.Optimizer:
        if self.reference == "AdamW fp32":
            matrices = [p for p in model.parameters() if p.ndim == 2]
            others = [p for p in model.parameters() if p.ndim != 2]
            groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
            return BlockwiseAdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.1, **self.options)
        return DistMuon(model.named_parameters(), lr=lr, adamw_lr=adamw_lr, **self.options)


ARMS = [
    Arm("fp32", {"momentum_state": "fp32"}),
    Arm("lowrank4", {"momentum_state": "lowrank4"}),
    Arm("grasp4", {"momentum_state": "grasp4"}),
    Arm("linear8", {"momentum_state": "linear8"}),
    Arm("int4", {"momentum_state": "int4"}),
    Arm("linear8, block 2048", {"momentum_state": "linear8", "block_size": 2048}),
    Arm("dynamic8", {"momentum_state": "dynamic8"}),
    Arm("nf4, block 64", {"momentum_state": "nf4", "block_size": 64}),
    Arm("linear8, int8 wire", {"momentum_state": "linear8", "wire": "int8"}),
    Arm("linear8, nf4 wire", {"momentum_state": "linear8", "wire": "nf4"}),
    Arm("AdamW fp32", {"state": "fp32"}, "AdamW fp32"),
    Arm("AdamW dynamic8", {"state": "dynamic8"}, "AdamW fp32"),
    Arm("AdamW linear8", {"state": "linear8"}, "AdamW fp32"),
]


@dataclass(frozen=True)
class Run:
    """One training run. ``adamw`` learning rates are of the part that Muon leaves, and of the AdamW arms."""

    arm: Arm
    seed: int
    lr: float
    adamw_lr: float
    model: str
    steps: int
    batch_size: int
    sequence_length: int
    data: tuple[Path, ...]

    @property
    def file(self) -> str:
        return f"{self.arm.label} lr {self.lr:g} seed {self.seed}.json".replace(" ", "_").replace(",", "")

    @property
    def config(self) -> TrainConfig:
        return TrainConfig(
            model=self.model,  # type: ignore[arg-type] # checked by argparse
            steps=self.steps,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            eval_sequences=EVAL_SEQUENCES,
            data=self.data,
            seed=self.seed,
            engine="single",
        )


def train(run: Run) -> dict[str, Any]:
    """Losses by step, and bytes of state, of one run."""
    environment = read_environment({})
    batches = Batches(run.config, environment, text_of(run.data))
    model = model_of(run.model, run.sequence_length, environment)
    model.load_state_dict(build_model(run.config.model, run.sequence_length, environment.device, run.seed).state_dict())
    optimizer = run.arm.build(model, run.lr, run.adamw_lr)
    scheduler = warmup_cosine(optimizer, run.steps // 20, run.steps)
    loss_of = losses_on(model, environment.device)
    validation: dict[int, float] = {}
    for step in range(1, run.steps + 1):
        (tokens,) = batches.training(step)
        loss_of(tokens).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % max(1, run.steps // EVALUATIONS) == 0 or step == run.steps:
            validation[step] = evaluate(loss_of, batches)
            if not math.isfinite(validation[step]):
                break
    return {
        "arm": run.arm.label,
        "seed": run.seed,
        "lr": run.lr,
        "validation": validation,
        "final": validation[max(validation)],
        "best": min(validation.values()),
        "bytes_per_element": momentum_bytes(optimizer),
    }


def momentum_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of state for each element of the matrices of the first group: the momentum, or both moments of AdamW."""
    matrices = optimizer.param_groups[0]["params"]
    stored = sum(value.nbytes for p in matrices for key, value in optimizer.state[p].items() if key != "step")
    return stored / sum(p.numel() for p in matrices)


@torch.no_grad()
def evaluate(loss_of: Callable[[torch.Tensor], torch.Tensor], batches: Batches) -> float:
    losses = [loss_of(tokens) for tokens, _ in batches.validation()]
    return float(torch.cat(losses).mean())


def losses_on(model: nn.Module, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Mean cross entropy of each sequence, in nats a byte; the model computes in bf16 on GPUs."""
    forward = compiled(model) if device.type == "cuda" else model

    def losses(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = forward(input_ids=tokens[:, :-1]).logits
        targets = tokens[:, 1:]
        return (
            F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets).mean(1)
        )

    return losses


@lru_cache(maxsize=1)
def model_of(name: str, sequence_length: int, environment: Environment) -> nn.Module:
    """One model a process, whose weights each run sets: it is compiled once."""
    return build_model(name, sequence_length, environment.device, seed=0)  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def compiled(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model)


@lru_cache(maxsize=1)
def text_of(data: tuple[Path, ...]) -> TextData:
    return load_text(TrainConfig(data=data))


def take_gpu(counter: Any) -> None:
    """Gives each worker process a GPU in turn."""
    with counter.get_lock():
        index = counter.value
        counter.value += 1
    if torch.cuda.is_available():
        torch.cuda.set_device(index % torch.cuda.device_count())


def finish(pool: ProcessPoolExecutor, runs: Iterable[Run], out: Path) -> list[dict[str, Any]]:
    """Results of all runs, from ``out`` where they are there."""
    results, pending = [], {}
    for run in dict.fromkeys(runs):
        path = out / run.file
        if path.exists():
            results.append(json.loads(path.read_text()))
        else:
            pending[pool.submit(train, run)] = path
    futures: Iterable[Future[dict[str, Any]]] = as_completed(pending)
    for future in futures:
        result = future.result()
        pending[future].write_text(json.dumps(result, indent=1) + "\n")
        print(f"  {result['arm']}, lr {result['lr']:g}, seed {result['seed']}: {result['final']:.4f}", flush=True)
        results.append(result)
    return results


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    label: str
    finals: list[float]  # by seed
    best: float  # mean over seeds
    gap: float
    error: float  # standard error of the gap; nan for one seed
    bytes_per_element: float


def summarise(results: Sequence[dict[str, Any]], arms: Sequence[Arm]) -> list[Row]:
    found = {(result["arm"], result["seed"]): result for result in results}
    rows = []
    for arm in arms:
        mine = [result for result in results if result["arm"] == arm.label]
        mine.sort(key=lambda result: result["seed"])
        gaps = [
            r["final"] - found[arm.reference, r["seed"]]["final"] for r in mine if (arm.reference, r["seed"]) in found
        ]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        if mine:
            rows.append(
                Row(
                    arm.label,
                    [r["final"] for r in mine],
                    statistics.mean(r["best"] for r in mine),
                    statistics.mean(gaps) if gaps else math.nan,
                    error,
                    mine[0]["bytes_per_element"],
                )
            )
    return rows


def show(rows: Sequence[Row]) -> None:
    print(f"\n{'arm':<22}{'final, by seed':<28}{'best':>8}{'gap':>10}{'± s.e.':>9}{'bytes':>9}")
    for r in rows:
        finals = " ".join(f"{final:.4f}" for final in r.finals)
        print(f"{r.label:<22}{finals:<28}{r.best:>8.4f}{r.gap:>+10.4f}{r.error:>9.4f}{r.bytes_per_element:>9.3f}")


def plot(results: Sequence[dict[str, Any]], rows: Sequence[Row], arms: Sequence[Arm], path: Path) -> None:
    """Validation loss less the reference's, by step; and the final gaps with their standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {(result["arm"], result["seed"]): result["validation"] for result in results}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    judged = [arm for arm in arms if arm.label != arm.reference]
    for arm in judged:
        pairs = [
            (found[arm.label, s], found[arm.reference, s])
            for a, s in found
            if a == arm.label and (arm.reference, s) in found
        ]
        steps = [step for step in pairs[0][0] if all(step in v and step in r for v, r in pairs)] if pairs else []
        means = [statistics.mean(v[step] - r[step] for v, r in pairs) for step in steps]
        left.plot([int(step) for step in steps], means, marker=".", label=arm.label)
    left.axhline(0, color="black", linewidth=0.8)
    left.set(xlabel="step", ylabel="validation loss less the fp32 one's (nats a byte)")
    left.legend(fontsize=8)
    by_label = {row.label: row for row in rows}
    bars = [by_label[arm.label] for arm in judged if arm.label in by_label]
    right.barh(
        [r.label for r in bars], [r.gap for r in bars], xerr=[0 if math.isnan(r.error) else r.error for r in bars]
    )
    right.axvline(0, color="black", linewidth=0.8)
    right.invert_yaxis()
    right.set(xlabel="final gap (nats a byte), mean over seeds and its standard error")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="65m", choices=get_args(ModelName))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        default=[0.02],
        help="of Muon; the best is used, the first tried first",
    )
    parser.add_argument("--adamw-lr", type=float, default=3e-3, help="of what Muon leaves to AdamW")
    parser.add_argument("--adamw-arms-lr", type=float, default=1e-3, help="of the arms that are AdamW alone")
    parser.add_argument("--arms", nargs="+", default=[arm.label for arm in ARMS], metavar="ARM")
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="text files or folders")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on each GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/fidelity"))
    given = parser.parse_args()
    arms = [arm for arm in ARMS if arm.label in given.arms]
    given.out.mkdir(parents=True, exist_ok=True)
    gpus = torch.cuda.device_count()
    context = multiprocessing.get_context("spawn")

    def run_of(arm: Arm, seed: int, lr: float) -> Run:
        lr = given.adamw_arms_lr if arm.reference == "AdamW fp32" else lr
        return Run(
            arm,
            seed,
            lr,
            given.adamw_lr,
            given.model,
            given.steps,
            given.batch_size,
            given.sequence_length,
            tuple(given.data),
        )

    with ProcessPoolExecutor(
        max(1, gpus) * given.jobs, context, initializer=take_gpu, initargs=(context.Value("i", 0),)
    ) as pool:
        tuning = [run_of(ARMS[0], 0, lr) for lr in given.learning_rates]
        # The first learning rate is a guess: its runs need not wait for the others.
        lr = given.learning_rates[0]
        results = finish(pool, [*tuning, *(run_of(arm, s, lr) for s in range(given.seeds) for arm in arms)], given.out)
        tuned = [r for r in results if (r["arm"], r["seed"]) == (ARMS[0].label, 0)]
        lr = min(tuned, key=lambda result: result["final"])["lr"]
        print(f"learning rate {lr:g}", flush=True)
        results = finish(pool, [run_of(arm, s, lr) for s in range(given.seeds) for arm in arms], given.out)
    rows = summarise(results, arms)
    where = torch.cuda.get_device_name() if gpus else f"CPU, {platform.machine()}"
    print(f"\n{given.model}, {given.steps} steps, {gpus or 'no'} x {where}, torch {torch.__version__}")
    show(rows)
    machine = {"device": where, "gpus": gpus, "torch": torch.__version__, "python": platform.python_version()}
    summary = {"machine": machine, "learning_rate": lr, "tuning": tuned, "rows": [asdict(row) for row in rows]}
    (given.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot(results, rows, arms, given.out / "fidelity.png")


if __name__ == "__main__":
    main()
