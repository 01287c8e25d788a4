"""The command line: `muon-dist train` and `estimate`, with one argument per field of their configs, `inspect` and
`convert`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from muon_dist.launch.config import EstimateConfig, TrainConfig, UsageError


def add_config_arguments(
    parser: argparse.ArgumentParser, config_class: type[TrainConfig] | type[EstimateConfig]
) -> None:
    """Only options that are given end up in the namespace: the class has the defaults, and DeepSpeed's file may fill in
    what isn't given."""
    annotations = get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        flag = f"--{field.name.replace('_', '-')}"
        kind, help_text = get_args(annotations[field.name])
        if kind is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=help_text)
        elif get_origin(kind) is tuple:
            item = get_args(kind)[0]
            parser.add_argument(
                flag, nargs="+", type=item, default=argparse.SUPPRESS, metavar=item.__name__.upper(), help=help_text
            )
        else:
            if field.default not in ("", None):
                help_text += f" (default: {field.default})"
            if get_origin(kind) is Literal:
                parser.add_argument(flag, choices=get_args(kind), default=argparse.SUPPRESS, help=help_text)
                continue
            if get_origin(kind) is UnionType:  # X | None: not given is None
                kind = get_args(kind)[0]
            parser.add_argument(
                flag, type=kind, default=argparse.SUPPRESS, metavar=kind.__name__.upper(), help=help_text
            )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="muon-dist", description="Train with sharded Muon, tell its cost, read its checkpoints."
    )
    # The deepspeed launcher puts it before all other arguments; it says the same as LOCAL_RANK, which is read instead.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True)
    train_parser = commands.add_parser(
        "train",
        help="train a Llama from scratch on text",
        description="Train a Llama from scratch on the bytes of text files: alone, or on every rank that torchrun, "
        "deepspeed or mpirun starts.",
    )
    add_config_arguments(train_parser, TrainConfig)
    train_parser.set_defaults(run=train)
    estimate_parser = commands.add_parser(
        "estimate",
        help="tell what a job will need: memory of a rank, bytes that travel, FLOPs",
        description="Bytes on the fullest rank under DistMuon and its peers, and what a step of DistMuon costs, from "
        "the shapes of a model: nothing is built or trained.",
    )
    estimate_parser.add_argument(
        "model",
        help="a preset of `train`, a config.json of transformers or its folder, a model's id on the Hugging Face hub, "
        "or a JSON file of shapes by parameter name",
    )
    add_config_arguments(estimate_parser, EstimateConfig)
    estimate_parser.set_defaults(run=estimate)
    inspect_parser = commands.add_parser("inspect", help="print what a portable checkpoint holds, and check it")
    inspect_parser.add_argument("folder", type=Path)
    inspect_parser.set_defaults(run=inspect)
    convert_parser = commands.add_parser(
        "convert",
        help="turn a portable checkpoint into a file of torch.optim.Muon's and AdamW's state, or back, or a checkpoint "
        "of DeepSpeed's into a portable one",
        description="A folder is a portable checkpoint, or one that DeepSpeed wrote; a file holds the state_dict of a "
        'torch.optim.Muon and a torch.optim.AdamW, as torch.save({"muon": ..., "adamw": ...}) writes them.',
    )
    convert_parser.add_argument("source", type=Path, help="a portable checkpoint, a file, or what DeepSpeed wrote")
    convert_parser.add_argument(
        "target", type=Path, help="a file, or else a portable checkpoint; it must not exist yet"
    )
    convert_parser.set_defaults(run=convert)
    options = vars(parser.parse_args(arguments))
    del options["local_rank"]
    run, command = options.pop("run"), options.pop("command")
    try:
        code = run(options)
    except UsageError as error:
        commands.choices[command].error(str(error))
    if code:
        sys.exit(code)


def train(options: dict[str, Any]) -> int:
    if "data" in options:
        options["data"] = tuple(options["data"])
    config = TrainConfig(**options)
    try:
        # Imported late: it takes seconds (transformers), and `--help` or a wrong argument shouldn't wait for it.
        from muon_dist.launch.interruption import EXIT_CODE
        from muon_dist.launch.train import run
    except ModuleNotFoundError as error:
        raise UsageError(f"{error}; training needs more than the optimizer: pip install 'muon_dist[train]'") from None
    return 0 if run(config, given=options) else EXIT_CODE


def estimate(options: dict[str, Any]) -> int:
    from muon_dist.launch.estimate import run

    run(options.pop("model"), EstimateConfig(**options))
    return 0


def inspect(options: dict[str, Any]) -> int:
    from muon_dist.checkpoint.inspect import describe

    try:
        print(describe(options["folder"]))
    except ValueError as error:
        raise UsageError(str(error)) from None
    return 0


def convert(options: dict[str, Any]) -> int:
    from muon_dist.checkpoint.convert import from_torch, to_torch
    from muon_dist.integrations.deepspeed_files import is_deepspeed, to_portable

    source: Path = options["source"]
    convert_to = from_torch if not source.is_dir() else to_portable if is_deepspeed(source) else to_torch
    try:
        convert_to(source, options["target"])
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from None
    return 0


if __name__ == "__main__":
    main()
