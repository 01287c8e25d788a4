"""`muon-dist train`: the training loop, the same for every engine and optimizer."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from muon_dist import DistMuon
from muon_dist.launch.checkpointing import Checkpoints
from muon_dist.launch.config import TrainConfig, UsageError
from muon_dist.launch.data import Batches, TextData, load_text
from muon_dist.launch.deepspeed_engine import DeepSpeedEngine, import_deepspeed
from muon_dist.launch.ds_config import reconcile
from muon_dist.launch.engines import Engine, TorchEngine
from muon_dist.launch.environment import Environment, attempt, process_group, read_environment
from muon_dist.launch.interruption import Interruption
from muon_dist.launch.metrics import Metrics
from muon_dist.launch.models import build_model
from muon_dist.memory import measured_state_bytes


def run(config: TrainConfig, given: Collection[str] = ()) -> bool:
    """Everything that can be wrong with the command is found before the ranks meet.

    Args:
        given: the options that the user named, which DeepSpeed's file must not contradict.

    Returns:
        Whether the run is done; else it was interrupted and can be resumed.
    """
    if attempt(os.environ):
        config = dataclasses.replace(config, resume=True)
    if not config.resume and (config.out / "metrics.jsonl").exists():
        raise UsageError(f"--out {config.out} already holds a run; add --resume to continue it, or name another folder")
    environment = read_environment(os.environ)
    ds_config = None
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UsageError("--wandb needs W&B's library: pip install 'muon_dist[wandb]'")
    if config.ds_config is not None:
        config, ds_config = reconcile(config, config.ds_config, given, environment.world_size)
        import_deepspeed()
    config.check_world_size(environment.world_size)
    text = load_text(config)
    with process_group(environment):
        return train(config, environment, text, ds_config)


def train(config: TrainConfig, environment: Environment, text: TextData, ds_config: dict[str, Any] | None) -> bool:
    batches = Batches(config, environment, text)
    model = build_model(config.model, config.sequence_length, environment.device, config.seed)
    facts: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in model.parameters())
    }  # before they are sharded
    engine: Engine
    engine = DeepSpeedEngine(config, model, ds_config) if ds_config else TorchEngine(config, environment, model)
    checkpoints = Checkpoints(config.out / "checkpoints", config.keep_checkpoints, environment, config.async_save)
    interruption = Interruption(environment)
    first_step = 1 + (checkpoints.load_newest(engine) if config.resume else 0)
    if first_step > config.steps:
        print(f"{config.out}: all {config.steps} steps are done, nothing to resume")
        return True

    started = time.perf_counter()
    metrics = Metrics(
        config.out, environment.device, first_step, config.steps, environment.is_main, wandb_project=config.wandb
    )
    observers = [optimizer.observer for optimizer in engine.optimizers if isinstance(optimizer, DistMuon)]
    with closing(metrics):
        for step in range(first_step, config.steps + 1):
            is_last = step == config.steps
            seed_random_numbers(config.seed, step, environment.rank)
            lr = engine.optimizers[0].param_groups[0]["lr"]
            is_observed = config.statistics_every > 0 and step % config.statistics_every == 0
            for observer in observers:
                observer.observing = is_observed
            loss = backward(engine, batches.training(step))
            grad_norm = engine.step()

            metrics.advance(config.batch_size * config.sequence_length)
            if step % config.log_every == 0 or is_last:
                mean_loss = environment.sum(loss) / environment.world_size
                metrics.train(step, loss=mean_loss, lr=lr, grad_norm=float(grad_norm))
            if is_observed:
                for observer in observers:
                    metrics.optimizer(step, observer.latest)
            if step % config.eval_every == 0 or is_last:
                with metrics.untimed():
                    validation_loss = evaluate(engine, environment, batches.validation())
                metrics.evaluation(step, validation_loss)
            is_interrupted = interruption.is_agreed() and not is_last
            is_due = config.checkpoint_every and step % config.checkpoint_every == 0
            if is_last or is_interrupted or is_due:
                with metrics.untimed():
                    checkpoints.save(engine, step)
            if is_interrupted:
                break
        with metrics.untimed():
            checkpoints.wait()

    if is_interrupted:
        if environment.is_main:
            print(f"{config.out}: interrupted and saved after step {step}; --resume goes on")
        engine.close()
        return False

    facts |= {
        "first_step": first_step,
        "steps": config.steps,
        "seconds": time.perf_counter() - started,
        "validation_loss": validation_loss,
        "state_bytes_per_rank": {
            "measured": environment.maximum(sum(measured_state_bytes(optimizer) for optimizer in engine.optimizers)),
            "estimated": engine.expected_state_bytes,
        },
    }
    if ds_config is not None:
        facts["ds_config"] = ds_config
    if environment.is_main:
        write_result(config, environment, facts)
    engine.close()
    return True


def seed_random_numbers(seed: int, step: int, rank: int) -> None:
    """A step's random numbers are a function of seed, step and rank: a resumed run needs no state of them."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))


def backward(engine: Engine, micro_batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add up the step's gradients; returns this rank's mean loss, still on the device."""
    losses = []
    for index, tokens in enumerate(micro_batches):
        with engine.micro_batch(is_last=index == len(micro_batches) - 1):
            loss = losses_per_sequence(engine, tokens).mean()
            engine.backward(loss)
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def losses_per_sequence(engine: Engine, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of every sequence, in nats a byte."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with engine.precision():
        logits = engine.model(input_ids=inputs).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets).mean(dim=1)


@torch.no_grad()
def evaluate(engine: Engine, environment: Environment, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean loss over the held-out sequences, every rank taking its share of them."""
    engine.model.eval()
    loss, weight = torch.zeros(2, dtype=torch.float64, device=environment.device)
    for tokens, weights in batches:
        loss += (losses_per_sequence(engine, tokens) * weights).sum()
        weight += weights.sum()
    engine.model.train()
    return environment.sum(loss) / environment.sum(weight)


def write_result(config: TrainConfig, environment: Environment, facts: dict[str, Any]) -> None:
    """result.json: what the run was, where it ran and what came of it; `summary.py` compares these."""
    on_cuda = environment.device.type == "cuda"
    result = {
        **facts,
        "config": dataclasses.asdict(config),
        "world_size": environment.world_size,
        "device": torch.cuda.get_device_name(environment.device) if on_cuda else "cpu",
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "muon_dist", "transformers")},
    }
    (config.out / "result.json").write_text(json.dumps(result, indent=2, default=str) + "\n")
