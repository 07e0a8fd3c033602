"""Images per second of the trainer and of other training loops with the same network, images, batch and precision.

    python tests/benchmarks/compare_trainers.py --config configs/demo.yaml --data.shards DIR [--peers NAMES] [--json FILE]

Requires `pip install -e ".[bench]"` for Lightning, diffusers and pythae. All other options are those of vae_scale.train.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer_peers import Peer, compare, peers

from vae_scale.bench import add_measuring_options, check_positive, parse_training_options, print_training_report
from vae_scale.benchmark import training
from vae_scale.benchmark.training import Report
from vae_scale.errors import cli_main
from vae_scale.training.trainer import Trainer


@dataclass
class TrainerReport(Report):
    """A report that also holds `over_FAMILY` ratios.

    Attributes:
        missing: Excluded loops, with the reason.
    """

    missing: dict[str, str]


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv`, which defaults to `sys.argv[1:]`."""
    parser = argparse.ArgumentParser(description="Measure the trainer and other training loops.", allow_abbrev=False)
    parser.add_argument(
        "--peers", default="", metavar="NAMES", help="any of notebook,torch,lightning,diffusers,pythae (default: all)"
    )
    parser.add_argument("--step", action="store_true", help="compare with the training step alone")
    add_measuring_options(parser)
    args, training_options = parser.parse_known_args(argv)
    check_positive(args, "repeats")
    config = parse_training_options(training_options)
    names = [name for name in args.peers.split(",") if name]
    loops: list[Peer] = []
    missing: dict[str, str] = {}

    def peer_tasks(trainer: Trainer, scratch: Path) -> dict[str, Callable[[], float]]:
        loops[:], reasons = peers(trainer, training.SECONDS, scratch, names)
        missing.update(reasons)
        return {peer.name: peer.run for peer in loops}

    report = training.measure(config, not args.step, args.repeats, more_tasks=peer_tasks)
    rows = {row.name: row for row in report.rows}
    ratios, not_learning = compare(rows[training.STEP if args.step else training.TRAIN].median, loops, rows)
    report.ratios |= ratios
    report.rows = [row for row in report.rows if row.name not in not_learning]
    report = TrainerReport(**vars(report), missing=missing | not_learning)
    print_training_report(report, args.json)
    for family, reason in report.missing.items():
        print(f"skipped {family}: {reason}")


if __name__ == "__main__":
    main()
