"""One run from two descriptions: the command's options and DeepSpeed's JSON file must say the same.

Where only one of them speaks, it fills in the other: what the file leaves out or has as "auto" comes from the command,
an option that the command leaves at its default takes the file's value. Where both speak and differ, nothing runs.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from muon_dist.launch.config import TrainConfig, UsageError

AUTO = "auto"
DIST_MUON = "DistMuon"  # muon_dist.integrations.deepspeed.JSON_NAME, without importing DeepSpeed


class Entry(NamedTuple):
    """A key of the file and the option that means the same."""

    key: str  # dotted
    option: str
    is_needed: bool = True  # written where the file leaves it out; else only where it says "auto"

    def to_json(self, value: Any) -> Any:
        if self.option == "clip_norm" and math.isinf(value):
            return 0.0  # no clipping; DeepSpeed clips at 1.0 where the key is missing
        return value == "bf16" if self.option == "dtype" else value

    def to_option(self, stated: Any) -> Any:
        if self.option == "clip_norm" and stated == 0:
            return math.inf
        if self.option == "dtype":
            return "bf16" if stated else "fp32"
        return stated


ENGINE_ENTRIES = (
    Entry("train_batch_size", "batch_size"),
    Entry("gradient_accumulation_steps", "accumulation_steps"),
    Entry("gradient_clipping", "clip_norm"),
    Entry("bf16.enabled", "dtype"),
)
DIST_MUON_ENTRIES = tuple(
    Entry(f"optimizer.params.{option}", option)
    for option in (
        *("lr", "momentum", "weight_decay", "momentum_state", "block_size", "polar", "wire", "offload_momentum"),
        "adamw_lr",
    )
)
MICRO_BATCH = "train_micro_batch_size_per_gpu"


def reconcile(
    config: TrainConfig, file: Path, given: Collection[str], world_size: int
) -> tuple[TrainConfig, dict[str, Any]]:
    """The run as both say it, once as options and once as DeepSpeed's configuration.

    Args:
        given: the options that the command line names; the others have their defaults.

    Raises:
        UsageError: both say something, and not the same; or the file says what this command cannot do.
    """
    ds = read_json(file)
    optimizer = ds.setdefault("optimizer", {})
    name = optimizer.setdefault("type", DIST_MUON)
    if "optimizer" in given and (config.optimizer, name) != ("dist_muon", DIST_MUON):
        raise UsageError(
            f"{file}: optimizer.type is {name!r}, --optimizer {config.optimizer}; with --engine deepspeed the file "
            f"names the optimizer: leave --optimizer out"
        )
    require_supported(file, ds)
    entries = (*ENGINE_ENTRIES, *optimizer_entries(name))
    config = adopt(config, file, ds, entries, given, world_size)
    config.check_world_size(world_size)
    fill_in(ds, entries, config, world_size)

    # DistMuon's integration reads "auto" as the default itself.
    unknown = [key for key in keys_that_are_auto(ds) if name != DIST_MUON or not key.startswith("optimizer.params.")]
    if unknown:
        raise UsageError(f'{file}: {", ".join(unknown)}: the command has nothing to put for "auto"; write a value')
    taken = {entry.option for entry in entries if lookup(ds, entry.key) is not None}
    lost = [flag(entry.option) for entry in DIST_MUON_ENTRIES if entry.option in given and entry.option not in taken]
    if lost:
        raise UsageError(
            f"{file}: optimizer.params of {name} has no place for {', '.join(lost)}; leave it out, or write the key "
            f'that takes it with "auto"'
        )
    return config, ds


def require_supported(file: Path, ds: dict[str, Any]) -> None:
    if "scheduler" in ds:
        raise UsageError(f"{file}: scheduler: the command schedules learning rates (--warmup-steps); leave it out")
    if "bfloat16" in ds:
        raise UsageError(f"{file}: bfloat16: write bf16, DeepSpeed's name for it today")
    if lookup(ds, "fp16.enabled") not in (None, AUTO, False):
        raise UsageError(f"{file}: fp16.enabled: the command trains in fp32 or bf16; leave fp16 out")
    ds.pop("fp16", None)


def adopt(
    config: TrainConfig,
    file: Path,
    ds: dict[str, Any],
    entries: Sequence[Entry],
    given: Collection[str],
    world_size: int,
) -> TrainConfig:
    """The options with the file's values, which must be those of the options that are given."""
    for entry in entries:
        stated = lookup(ds, entry.key)
        if stated in (None, AUTO):
            continue
        value, ours = entry.to_option(stated), getattr(config, entry.option)
        if entry.option in given and value != ours:
            raise UsageError(
                f"{file}: {entry.key} is {stated}, {flag(entry.option)} {ours}; leave {flag(entry.option)} out, or "
                f'write "auto" in the file'
            )
        config = dataclasses.replace(config, **{entry.option: value})

    micro_batch_size = ds.get(MICRO_BATCH, AUTO)
    if micro_batch_size == AUTO:
        return config
    batch_size = micro_batch_size * world_size * config.accumulation_steps
    is_stated = "batch_size" in given or ds.get("train_batch_size", AUTO) != AUTO
    if is_stated and batch_size != config.batch_size:
        raise UsageError(
            f"{file}: {MICRO_BATCH} is {micro_batch_size}, which makes {batch_size} sequences a step on {world_size} "
            f"ranks x {config.accumulation_steps} accumulation steps, but the batch size is {config.batch_size}; write "
            f'"auto" in the file'
        )
    return dataclasses.replace(config, batch_size=batch_size)


def fill_in(ds: dict[str, Any], entries: Sequence[Entry], config: TrainConfig, world_size: int) -> None:
    for entry in entries:
        stated = lookup(ds, entry.key)
        if stated == AUTO or (stated is None and entry.is_needed):
            store(ds, entry.key, entry.to_json(getattr(config, entry.option)))
    ds[MICRO_BATCH] = config.micro_batch_size(world_size)


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise UsageError(f"--ds-config {file}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"--ds-config {file} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--ds-config {file} holds no JSON object; it needs DeepSpeed's configuration")
    return content


def optimizer_entries(name: str) -> tuple[Entry, ...]:
    """DistMuon takes the command's options; of other optimizers only the keys that are written as "auto"."""
    if name == DIST_MUON:
        return DIST_MUON_ENTRIES
    lr = "adamw_lr" if "adam" in name.lower() else "lr"
    options = {"lr": lr, "muon_lr": "lr", "adam_lr": "adamw_lr", "momentum": "momentum", "weight_decay": "weight_decay"}
    return tuple(Entry(f"optimizer.params.{key}", option, is_needed=False) for key, option in options.items())


def flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def lookup(content: dict[str, Any], key: str) -> Any:
    """The value under a dotted key, or None."""
    *path, last = key.split(".")
    for name in path:
        content = content.get(name, {})
    return content.get(last)


def store(content: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        content = content.setdefault(name, {})
    content[last] = value


def keys_that_are_auto(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from keys_that_are_auto(value, f"{prefix}{name}.")
        elif value == AUTO:
            yield f"{prefix}{name}"
