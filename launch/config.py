"""What the commands take: every option of `muon-dist train` and `estimate`, with its default and its help, in one typed
place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from muon_dist.options import DEFAULT_BLOCK_SIZE, DEFAULT_CHUNK_BYTES, AdamWState, MomentumState, Polar, Wire

EngineName = Literal["fsdp2", "ddp", "deepspeed", "single"]
ModelName = Literal["nano", "tiny", "small", "65m", "85m", "300m", "1b"]
OptimizerName = Literal["dist_muon", "adamw", "torch_muon"]
DtypeName = Literal["fp32", "bf16"]


class UsageError(Exception):
    """The command as given cannot run; the message says what was wrong and what to do instead."""


@dataclass(frozen=True)
class TrainConfig:
    """One field per option, annotated with its help; `cli.py` makes arguments of them, `result.json` records them."""

    out: Annotated[Path, "folder of the run: metrics.jsonl, checkpoints/, tensorboard/"] = Path("runs/train")

    engine: Annotated[EngineName, "how parameters lie on the ranks"] = "fsdp2"
    ds_config: Annotated[
        Path | None, "deepspeed: its JSON file, such as one of launch/configs; it names the optimizer"
    ] = None
    replicas: Annotated[int, "fsdp2: replicate the sharded model this many times (HSDP)"] = 1
    dtype: Annotated[
        DtypeName, "of forward and backward; parameters and reductions stay fp32 (deepspeed: its bf16)"
    ] = "fp32"
    model: Annotated[ModelName, "Llama preset, built from its config with fresh weights"] = "tiny"

    data: Annotated[tuple[Path, ...], "text files or folders (default: the Python standard library's sources)"] = ()
    hf_dataset: Annotated[str, "name of a `datasets` dataset with a `text` column, used instead of --data"] = ""
    sequence_length: Annotated[int, "bytes a sequence"] = 128
    batch_size: Annotated[int, "sequences a step, over all ranks and accumulation steps"] = 16
    accumulation_steps: Annotated[int, "micro-batches a step"] = 1
    steps: Annotated[int, "optimizer steps"] = 300

    optimizer: Annotated[
        OptimizerName, "which optimizer; all three split the parameters alike (deepspeed: its file says)"
    ] = "dist_muon"
    momentum_state: Annotated[MomentumState, "how dist_muon stores its momentum"] = "linear8"
    block_size: Annotated[int, "elements of a row that share a scale in the 8-bit and 4-bit states"] = (
        DEFAULT_BLOCK_SIZE
    )
    polar: Annotated[Polar, "coefficients of dist_muon's Newton-Schulz iteration"] = "doubling"
    wire: Annotated[Wire, "how dist_muon's matrices travel"] = "bf16"
    offload_momentum: Annotated[bool, "keep dist_muon's momentum in page-locked memory of the host (on GPUs)"] = False
    during_backward: Annotated[
        bool, "begin dist_muon's step during the backward pass before it; with --clip-norm inf (fsdp2, single)"
    ] = False
    lr: Annotated[float, "peak learning rate of the matrices that Muon updates"] = 2e-2
    adamw_lr: Annotated[float, "peak learning rate of everything that AdamW updates"] = 3e-3
    momentum: Annotated[float, "Muon's momentum"] = 0.95
    weight_decay: Annotated[float, "decoupled, on matrices only"] = 0.1
    clip_norm: Annotated[float, "largest norm of the whole raw gradient; inf leaves it as it is"] = 1.0
    warmup_steps: Annotated[int, "steps of linear warm-up; a cosine down to a tenth of the peak follows"] = 20
    seed: Annotated[int, "of the initial weights and of the order of the data"] = 0

    log_every: Annotated[int, "steps between training records"] = 10
    statistics_every: Annotated[int, "steps between records of dist_muon's statistics; 0: none"] = 0
    wandb: Annotated[str, "W&B project that records go to as well; a resumed run is a new one there"] = ""
    eval_every: Annotated[int, "steps between evaluations; the last step is always evaluated"] = 50
    eval_sequences: Annotated[int, "held-out sequences of an evaluation, the same ones every time"] = 256
    checkpoint_every: Annotated[int, "steps between checkpoints; 0: only the last step is saved"] = 0
    async_save: Annotated[
        bool, "write checkpoints in the background, from a copy in host memory (not with deepspeed)"
    ] = False
    keep_checkpoints: Annotated[int, "how many of the newest checkpoints are kept"] = 3
    resume: Annotated[bool, "continue from the newest checkpoint in --out, if there is one"] = False

    def __post_init__(self) -> None:
        at_least_one = ("replicas", "sequence_length", "batch_size", "accumulation_steps", "steps", "block_size")
        for name in (*at_least_one, "log_every", "eval_every", "eval_sequences", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.replicas > 1 and self.engine != "fsdp2":
            raise UsageError(f"--replicas is for --engine fsdp2, not for --engine {self.engine}")
        if self.engine == "deepspeed" and self.ds_config is None:
            raise UsageError("--engine deepspeed needs --ds-config, a JSON file such as launch/configs/zero2.json")
        if self.engine != "deepspeed" and self.ds_config is not None:
            raise UsageError(f"--ds-config is for --engine deepspeed, not for --engine {self.engine}")
        if self.engine == "deepspeed" and self.async_save:
            raise UsageError("--async-save is for torch's engines; DeepSpeed writes its checkpoints itself")
        if self.during_backward:
            if self.engine not in ("fsdp2", "single") or self.optimizer != "dist_muon":
                raise UsageError("--during-backward is for --optimizer dist_muon with --engine fsdp2 or single")
            if not math.isinf(self.clip_norm):
                raise UsageError("--during-backward uses gradients before their norm is known; add --clip-norm inf")
        if self.data and self.hf_dataset:
            raise UsageError("--data and --hf-dataset both name the text to train on; give one of them")

    def check_world_size(self, world_size: int) -> None:
        if self.engine == "single" and world_size > 1:
            raise UsageError(f"--engine single is one process, the job has {world_size}; use fsdp2 or ddp")
        if world_size % self.replicas:
            raise UsageError(f"--replicas {self.replicas} does not divide the {world_size} ranks of this job")
        passes = world_size * self.accumulation_steps
        if self.batch_size % passes:
            raise UsageError(
                f"--batch-size {self.batch_size} does not split over {world_size} ranks x "
                f"{self.accumulation_steps} accumulation steps; use a multiple of {passes}"
            )

    def micro_batch_size(self, world_size: int) -> int:
        """Sequences in one forward pass of one rank."""
        return self.batch_size // (world_size * self.accumulation_steps)


@dataclass(frozen=True)
class EstimateConfig:
    """A job that does not run yet; the model is the command's argument."""

    world_size: Annotated[int, "ranks of the job"] = 8
    engine: Annotated[EngineName, "how parameters lie on the ranks"] = "fsdp2"
    stage: Annotated[int | None, "deepspeed: the ZeRO stage (default: 3)"] = None
    replicas: Annotated[int, "fsdp2: replicate the sharded model this many times (HSDP)"] = 1
    dtype: Annotated[DtypeName, "of parameters and gradients; ZeRO adds its own fp32 copy of the parameters"] = "bf16"

    momentum_state: Annotated[MomentumState, "how dist_muon stores its momentum"] = "linear8"
    block_size: Annotated[int, "elements of a row that share a scale in the 8-bit and 4-bit states"] = (
        DEFAULT_BLOCK_SIZE
    )
    adamw_state: Annotated[AdamWState, "how dist_muon stores the moments of what it gives to AdamW"] = "fp32"
    wire: Annotated[Wire, "how dist_muon's matrices travel"] = "bf16"
    chunk_bytes: Annotated[int, "bound on each of the exchange's buffers on a rank"] = DEFAULT_CHUNK_BYTES
    offload_momentum: Annotated[bool, "keep dist_muon's momentum in page-locked memory of the host (on GPUs)"] = False

    out: Annotated[Path | None, "write the figures here, as JSON"] = None
    plot: Annotated[Path | None, "draw them here"] = None

    def __post_init__(self) -> None:
        for name in ("world_size", "replicas", "block_size", "chunk_bytes"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.stage not in (None, *range(4)):
            raise UsageError(f"--stage is {self.stage}; ZeRO has the stages 0 to 3")
        if self.stage is not None and self.engine != "deepspeed":
            raise UsageError(f"--stage is for --engine deepspeed, not for --engine {self.engine}")
        if self.replicas > 1 and self.engine != "fsdp2":
            raise UsageError(f"--replicas is for --engine fsdp2, not for --engine {self.engine}")
        if self.world_size % self.replicas:
            raise UsageError(f"--replicas {self.replicas} does not divide the {self.world_size} ranks of this job")
        if self.engine == "single" and self.world_size > 1:
            raise UsageError("--engine single is one process; add --world-size 1")

    @property
    def zero_stage(self) -> int | None:
        """None where it is not DeepSpeed that trains."""
        if self.engine != "deepspeed":
            return None
        return 3 if self.stage is None else self.stage
