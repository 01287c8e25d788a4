"""The command line: `muon-dist train` with one argument per field of `TrainConfig`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from types import UnionType
from typing import Literal, get_args, get_origin, get_type_hints

from muon_dist.launch.config import TrainConfig, UsageError


def add_config_arguments(parser: argparse.ArgumentParser, config_class: type[TrainConfig]) -> None:
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
    parser = argparse.ArgumentParser(prog="muon-dist", description="Train with sharded Muon.")
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
    options = vars(parser.parse_args(arguments))
    del options["command"], options["local_rank"]
    if "data" in options:
        options["data"] = tuple(options["data"])
    try:
        config = TrainConfig(**options)
        # Imported late: it takes seconds (transformers), and `--help` or a wrong argument shouldn't wait for it.
        from muon_dist.launch.train import run
    except UsageError as error:
        train_parser.error(str(error))
    except ModuleNotFoundError as error:
        train_parser.error(f"{error}; training needs more than the optimizer: pip install 'muon_dist[train]'")
    try:
        run(config, given=options)
    except UsageError as error:
        train_parser.error(str(error))


if __name__ == "__main__":
    main()
