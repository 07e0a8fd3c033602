"""Images per second of the trainer and of other training loops with the same network, images, batch and precision.

    python tests/benchmarks/compare_trainers.py --config configs/demo.yaml --data.shards DIR [--peers NAMES] [--json FILE]

Requires `pip install -e ".[bench]"` for Lightning, diffusers and pythae. All other options are those of vae_scale.train.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainer_peers import compare, peers

from vae_scale.bench import add_measuring_options, parse_training_options
from vae_scale.benchmark import training
from vae_scale.benchmark.measuring import Report, alternate, print_report
from vae_scale.errors import cli_main


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv`, which defaults to `sys.argv[1:]`."""
    parser = argparse.ArgumentParser(description="Measure the trainer and other training loops.", allow_abbrev=False)
    parser.add_argument(
        "--peers", default="", metavar="NAMES", help="any of notebook,torch,lightning,diffusers,pythae (default: all)"
    )
    add_measuring_options(parser)
    args, training_options = parser.parse_known_args(argv)
    config = parse_training_options(training_options)
    names = [name for name in args.peers.split(",") if name]
    with training.open_trainer(config) as measured, tempfile.TemporaryDirectory() as scratch:
        measured.choose_steps(training.SECONDS)
        loops, missing = peers(measured.trainer, training.SECONDS, Path(scratch), names)
        tasks = {training.STEP: measured.step, training.TRAIN: measured.train} | {peer.name: peer.run for peer in loops}
        speeds = alternate(tasks, args.repeats)
    ratios, not_learning = compare(loops, speeds)
    for name in not_learning:
        del speeds[name]
    missing |= not_learning
    print_report(Report({"batch": measured.trainer.batch_size}, speeds, ratios), args.json, missing=missing)
    for family, reason in missing.items():
        print(f"skipped {family}: {reason}")


if __name__ == "__main__":
    main()
