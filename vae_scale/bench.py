"""`python -m vae_scale.bench data|step|train`: measures the throughput of data loading and training."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vae_scale.errors import UserError, cli_main

if TYPE_CHECKING:
    from vae_scale.benchmark.training import Report
    from vae_scale.config.options import Config

TRAINING_OPTIONS = "The options of python -m vae_scale.train, such as --config FILE, are accepted as well."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vae_scale.bench", description="Measure throughput on this machine.")
    commands = parser.add_subparsers(dest="what", required=True)
    data = commands.add_parser("data", help="images per second loaded from shards")
    data.add_argument("--shards", required=True, metavar="DIR", help="output folder of python -m vae_scale.pack")
    data.add_argument("--batch", type=int, default=256, metavar="N", help="images per batch (default: 256)")
    add_measuring_options(data)
    for name, text in {"step": "the training step alone", "train": "the trainer and of the step"}.items():
        training = commands.add_parser(name, help=f"images per second of {text}", epilog=TRAINING_OPTIONS, allow_abbrev=False)
        training.add_argument("--profile", type=Path, metavar="DIR", help="write a profiler trace of a few steps to DIR")
        add_measuring_options(training)
    return parser


def add_measuring_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that all measurements share."""
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="number of runs; the median is used (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, "Config | None"]:
    """Parses the command line and, except for `data`, the configuration of the training to measure.

    Raises:
        UserError: if a training option is unknown, of the wrong type or out of range.
    """
    parser = _parser()
    args, training_options = parser.parse_known_args(argv)
    if args.what == "data" and training_options:
        parser.error(f"unrecognized arguments: {' '.join(training_options)}")
    check_positive(args, "repeats", "batch")
    return args, None if args.what == "data" else parse_training_options(training_options)


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises UserError unless the named arguments that exist are at least 1."""
    for name in names:
        if getattr(args, name, 1) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least 1")


def parse_training_options(argv: Sequence[str]) -> "Config":
    """Parses options of `vae_scale.train`."""
    from vae_scale.config.parsing import parse

    config, is_dry_run = parse(argv)
    if is_dry_run:
        raise UserError("--dry-run is an option of python -m vae_scale.train")
    return config


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv`, by default that of the process."""
    args, config = parse_args(argv)
    if config is None:
        _measure_data(args)
        return
    from vae_scale.benchmark.training import measure

    print_training_report(measure(config, args.what == "train", args.repeats, args.profile), args.json)


def _measure_data(args: argparse.Namespace) -> None:
    from vae_scale.benchmark.data import measure
    from vae_scale.benchmark.measuring import machine, markdown, table, write_report
    from vae_scale.data.shards import ShardSet

    shards = ShardSet.open(args.shards)
    report, host = measure(shards, args.batch, args.repeats), machine()
    print(", ".join(f"{name} {value}" for name, value in host.items()))
    print(f"{args.shards}: {len(shards):,} images, {len(shards.shards)} shards, {shards.encoding}; batches of {args.batch}\n")
    print(table(report.rows))
    print()
    print(markdown([["ratio", ""], *([name, f"{ratio:,.2f}"] for name, ratio in report.ratios.items())]))
    print(f"\nfirst batch after {report.first_batch_seconds:.2f} s; ", end="")
    print(f"memory grew by {report.memory_bytes / 2**20:,.0f} MiB with a shuffle window of two shards")
    write_report(args.json, report)


def print_training_report(report: "Report", path: Path | None) -> None:
    """Prints a report of `vae_scale.benchmark.training.measure`, and writes it to `path` as JSON."""
    from vae_scale.benchmark.measuring import COPY, MATRIX, machine, markdown, write_report

    units = {MATRIX: (1e12, "TFLOP/s"), COPY: (1e9, "GB/s")}
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"{report.parameters:,} parameters, {report.flops_per_image / 1e9:,.2f} GFLOP per image; ", end="")
    print(f"batches of {report.batch}, {report.precision}; {report.steps} steps per run, without evaluation\n")
    lines = [["", "median", "lowest", "highest", ""]]
    for row in report.rows:
        size, unit = units.get(row.name, (1.0, "images/s"))
        speeds = [f"{speed / size:,.{2 if size > 1 else 1}f}" for speed in (row.median, min(row.runs), max(row.runs))]
        lines.append([row.name, *speeds, unit])
    print(markdown(lines))
    print()
    print(markdown([["ratio", ""], *([name, f"{ratio:.4f}"] for name, ratio in report.ratios.items())]))
    print(f"\npeak memory: {report.peak_memory_bytes / 2**20:,.0f} MiB")
    if report.parts:
        step = sum(part.ms_per_step for part in report.parts)
        lines = [["part of a step", "ms each", "ms per step", "share"]]
        for part in report.parts:
            lines.append([part.name, f"{part.ms_each:,.3f}", f"{part.ms_per_step:,.3f}", f"{part.ms_per_step / step:.2%}"])
        print()
        print(markdown(lines))
    write_report(path, report)


if __name__ == "__main__":
    main()
