"""The command line: `muon-dist train` with one argument per field of `TrainConfig`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args, get_origin, get_type_hints

from muon_dist.launch.config import TrainConfig, UsageError


def add_config_arguments(parser: argparse.ArgumentParser, config_class: type[TrainConfig]) -> None:
    annotations = get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        flag = f"--{field.name.replace('_', '-')}"
        kind, help_text = get_args(annotations[field.name])
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=help_text)
        elif get_origin(kind) is tuple:
            parser.add_argument(flag, nargs="+", type=get_args(kind)[0], default=(), metavar="PATH", help=help_text)
        elif get_origin(kind) is Literal:
            help_text += " (default: %(default)s)"
            parser.add_argument(flag, choices=get_args(kind), default=field.default, help=help_text)
        else:
            if field.default != "":
                help_text += " (default: %(default)s)"
            parser.add_argument(flag, type=kind, default=field.default, metavar=kind.__name__.upper(), help=help_text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="muon-dist", description="Train with sharded Muon.")
    commands = parser.add_subparsers(dest="command", required=True)
    train_parser = commands.add_parser(
        "train",
        help="train a Llama from scratch on text",
        description="Train a Llama from scratch on the bytes of text files, alone or on every rank of torchrun.",
    )
    add_config_arguments(train_parser, TrainConfig)
    options = vars(parser.parse_args(arguments))
    del options["command"]
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
        run(config)
    except UsageError as error:
        train_parser.error(str(error))


if __name__ == "__main__":
    main()
