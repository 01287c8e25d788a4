"""What storing momentum costs in accuracy, by codec and block size: the same gradients through every codec.

    python benchmarks/drift.py [--steps 300] [--model tiny] [--out drift.json]

Trains a Llama on the standard library's text with fp32 momentum and gives every step's gradients to momenta of all
the other codecs too. Each stores its momentum after each step, so its errors accumulate as in training. Reported, for
matrices of the last layer, as means over the second half of the steps:

- one step: relative error of storing the fp32 momentum once.
- drift: relative error of the momentum that was stored at every step.
- cosine: between the polar factors (five Polar Express steps) of the two momenta.
- bytes: per element, scales included.

Source of the probe: recurrent requantisation of one gradient sequence, as in arXiv 2605.11396's error analysis.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from muon_dist import DistMuon
from muon_dist.codecs import Codec, make_codec, make_low_rank_codec, nbytes
from muon_dist.launch.config import TrainConfig
from muon_dist.launch.data import Batches, load_text
from muon_dist.launch.environment import read_environment
from muon_dist.launch.models import build_model
from muon_dist.layout import Extent
from muon_dist.options import DEFAULT_BLOCK_SIZE, LowRankState, RowWiseState
from muon_dist.polar import polar_factor, schedule

MOMENTUM = 0.95
# Makes a codec for the largest of some row shards of a matrix: its extent.
MakeCodec = Callable[[Extent], Codec]


def row_wise(name: RowWiseState, block: int) -> MakeCodec:
    return lambda extent: make_codec(name, block)


def low_rank(name: LowRankState, rank_fraction: float | None = None) -> MakeCodec:
    return lambda extent: make_low_rank_codec(name, DEFAULT_BLOCK_SIZE, extent, rank_fraction)


EIGHT_BITS: tuple[RowWiseState, ...] = ("linear8", "dynamic8")
FOUR_BITS: tuple[RowWiseState, ...] = ("int4", "nf4")
# By label: the codec, and the number of row shards that are stored apart.
CODECS: dict[str, tuple[MakeCodec, int]] = {
    "bf16": (row_wise("bf16", 1), 1),
    **{f"{name}, block {block}": (row_wise(name, block), 1) for name in EIGHT_BITS for block in (32, 128, 2048)},
    **{f"{name}, block {block}": (row_wise(name, block), 1) for name in FOUR_BITS for block in (64, 128)},
    "grasp4": (low_rank("grasp4"), 1),
    "grasp4, 4 shards": (low_rank("grasp4"), 4),
    "lowrank4, rank 1/16": (low_rank("lowrank4", 1 / 16), 1),
    "lowrank4": (low_rank("lowrank4"), 1),
    "lowrank4, 4 shards": (low_rank("lowrank4"), 4),
}


class Stored:
    """A momentum that is decoded, updated and encoded at every step, shard by shard."""

    def __init__(self, make: MakeCodec, parts: int, like: Tensor) -> None:
        shards = like.chunk(parts)
        self.codec = make(Extent((like.shape[0], like.shape[1]), (shards[0].shape[0], like.shape[1]), (parts, 1)))
        self.buffers = [
            {name: torch.zeros(s.shape, dtype=s.dtype, device=like.device) for name, s in specs.items()}
            for specs in (self.codec.buffers(shard.shape) for shard in shards)
        ]
        self.bytes_per_element = sum(nbytes(self.codec, shard.shape) for shard in shards) / like.numel()

    def decoded(self, cols: int) -> Tensor:
        return torch.cat([self.codec.decode(buffers, cols) for buffers in self.buffers])

    def store(self, momentum: Tensor) -> None:
        for shard, buffers in zip(momentum.chunk(len(self.buffers)), self.buffers, strict=True):
            self.codec.encode(shard, buffers)

    def update(self, gradient: Tensor) -> Tensor:
        """Returns the momentum as it was before it was stored."""
        momentum = self.decoded(gradient.shape[-1]).lerp_(gradient, 1 - MOMENTUM)
        self.store(momentum)
        return momentum


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def probe(model_name: str, steps: int) -> dict[str, dict[str, float]]:
    config = TrainConfig(model=model_name, steps=steps, engine="single")  # type: ignore[arg-type] # checked by TrainConfig
    environment = read_environment({})
    batches = Batches(config, environment, load_text(config))
    model = build_model(config.model, config.sequence_length, environment.device, seed=0)
    optimizer = DistMuon(
        model.named_parameters(), lr=config.lr, momentum=MOMENTUM, adamw_lr=config.adamw_lr, momentum_state="fp32"
    )
    watched = [p for p in model.model.layers[-1].parameters() if p.ndim == 2]
    exact = [torch.zeros_like(p) for p in watched]
    stored = {name: [Stored(make, parts, p) for p in watched] for name, (make, parts) in CODECS.items()}
    polar = schedule("polar_express", 5)
    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for step in range(1, steps + 1):
        (tokens,) = batches.training(step)
        model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss.backward()
        for i, p in enumerate(watched):
            assert p.grad is not None
            gradient = p.grad
            exact[i].lerp_(gradient, 1 - MOMENTUM)
            judged = step > steps // 2 and step % 10 == 0
            direction = polar_factor(exact[i], polar) if judged else None
            for name, momenta in stored.items():
                momentum = momenta[i].update(gradient)
                if direction is not None:
                    once = copy.deepcopy(momenta[i])  # low-rank codecs start from where they are
                    once.store(exact[i])
                    theirs = polar_factor(momentum, polar)
                    figures[name]["one step"].append(relative_error(once.decoded(p.shape[-1]), exact[i]))
                    figures[name]["drift"].append(relative_error(momentum, exact[i]))
                    cosine = torch.nn.functional.cosine_similarity(theirs.flatten(), direction.flatten(), dim=0)
                    figures[name]["cosine"].append(float(cosine))
                    figures[name]["bytes"].append(momenta[i].bytes_per_element)
        optimizer.step()
        optimizer.zero_grad()
    return {name: {key: statistics.mean(found) for key, found in f.items()} for name, f in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    arguments = parser.parse_args()
    figures = probe(arguments.model, arguments.steps)
    print(f"{arguments.model}, {arguments.steps} steps, torch {torch.__version__}\n")
    print(f"{'codec':<22}{'bytes':>8}{'one step':>11}{'drift':>9}{'cosine':>9}")
    for name, f in figures.items():
        print(f"{name:<22}{f['bytes']:>8.4f}{f['one step']:>11.5f}{f['drift']:>9.5f}{f['cosine']:>9.5f}")
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
