"""`python -m vae_scale.bench data|step|train`: measures the throughput of data loading and training."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vae_scale.errors import UserError, cli_main

if TYPE_CHECKING:
    from vae_scale.config.options import Config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vae_scale.bench", description="Measure throughput on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_data_options(commands.add_parser("data", help="images per second loaded from shards"))
    epilog = "The options of python -m vae_scale.train, such as --config FILE, are accepted as well."
    for name, text in {"step": "the training step alone", "train": "the trainer and of the step"}.items():
        training = commands.add_parser(name, help=f"images per second of {text}", epilog=epilog, allow_abbrev=False)
        training.add_argument("--profile", type=Path, metavar="DIR", help="write a profiler trace of a few steps to DIR")
        add_measuring_options(training)
    return parser


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of measurements of data loading."""
    parser.add_argument("--shards", required=True, metavar="DIR", help="output folder of python -m vae_scale.pack")
    parser.add_argument("--batch", type=positive_int, default=256, metavar="N", help="images per batch (default: 256)")
    add_measuring_options(parser)


def add_measuring_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that all measurements share."""
    text = "number of runs; the median is used (default: 5)"
    parser.add_argument("--repeats", type=positive_int, default=5, metavar="N", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")


def positive_int(text: str) -> int:
    """Parses the value of an option that must be at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value}; it must be at least 1")
    return value


def parse_training_options(argv: Sequence[str]) -> "Config":
    """Parses options of `vae_scale.train`.

    Raises:
        UserError: if an option is unknown, of the wrong type or out of range.
    """
    from vae_scale.config.parsing import parse

    config, is_dry_run = parse(argv)
    if is_dry_run:
        raise UserError("--dry-run is an option of python -m vae_scale.train")
    return config


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv`, by default that of the process."""
    parser = _parser()
    args, training_options = parser.parse_known_args(argv)
    if args.command == "data":
        if training_options:
            parser.error(f"unrecognized arguments: {' '.join(training_options)}")
        from vae_scale.benchmark import data
        from vae_scale.data.shards import ShardSet

        report = data.measure(ShardSet.open(args.shards), args.batch, args.repeats)
    else:
        config = parse_training_options(training_options)
        from vae_scale.benchmark import training

        report = training.measure(config, args.command == "train", args.repeats, args.profile)
    from vae_scale.benchmark.measuring import print_report

    print_report(report, args.json)


if __name__ == "__main__":
    main()
