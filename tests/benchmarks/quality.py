"""Compares generative models trained with equal compute on the same images (`make quality SHARDS=DIR MINUTES=M`).

Each method is trained in separate processes for the same number of CPU seconds (wall-clock seconds on a GPU), including
start-up and fitting its prior. The number of training images is estimated from short runs beforehand, since schedules depend
on it, and corrected until the cost is within 5% of the budget. Samples, reconstructions and training images are compared
with equally many held-out images.

    python tests/benchmarks/quality.py --shards DIR --minutes 30 --methods ours --variant "flow --prior.depth=4"

Trained stages, features and metrics are kept in the folder of the results, and computed only once.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from quality_measuring import MAX_SAMPLES, Measuring, measure_methods
from quality_methods import DEVICE, HELD_OUT, METHODS, select_methods, training_splits
from quality_report import write_report
from quality_stages import Study, train_methods

from vae_scale.data.shards import ShardSet
from vae_scale.data.storage import is_url
from vae_scale.errors import UserError, cli_main


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare generative models trained with equal compute.")
    parser.add_argument("--shards", required=True, metavar="LOCATION", help="packed images; a folder or URL")
    text = "CPU minutes per method and seed, or wall-clock minutes on a GPU (default: 30)"
    parser.add_argument("--minutes", type=float, default=30, metavar="M", help=text)
    parser.add_argument("--methods", default=",".join(METHODS), metavar="NAME,...", help="default: all")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="trains with seeds 0 to N-1 (default: 1)")
    text = "adds ours with more options of the stage vae or flow, or of sampling from the flow (stage sample)"
    parser.add_argument("--variant", action="append", default=[], metavar='"STAGE OPTIONS"', help=text)
    parser.add_argument("--stages", metavar="NAME,...", help="limits ours and its variants to their first stages")
    text = f"samples and held-out images (default: all held-out images, at most {MAX_SAMPLES:,})"
    parser.add_argument("--samples", type=int, metavar="N", help=text)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), metavar="DIR", help="default: runs/quality")
    cores = len(os.sched_getaffinity(0))
    text = "stages trained in parallel, on CPUs (default: number of cores)"
    parser.add_argument("--jobs", type=int, default=cores, metavar="N", help=text)
    names = ["efficientnet_lite0", "inception"]
    parser.add_argument("--features", choices=names, default=names[0], help=f"default: {names[0]}")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights of the features")
    return parser


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv`, which defaults to `sys.argv[1:]`."""
    args = _parser().parse_args(argv)
    for name, low in (("minutes", 0.0), ("seeds", 0), ("samples", 5), ("jobs", 0)):
        value = getattr(args, name)
        if value is not None and value <= low:
            raise UserError(f"--{name} is {value:g}; it must be more than {low:g}")
    stages = None if args.stages is None else args.stages.split(",")
    shards = ShardSet.open(args.shards if is_url(args.shards) else Path(args.shards).resolve())
    methods = select_methods([name for name in args.methods.split(",") if name], args.variant, shards.image_shape[0], stages)
    if not training_splits(shards) or HELD_OUT not in shards.splits:
        raise UserError(f"{shards.location}: requires the split {HELD_OUT} and at least one other")
    # On a GPU, wall-clock time is measured, so stages are trained one at a time.
    study = Study(shards, args.out.resolve(), 60 * args.minutes, 1 if DEVICE == "cuda" else args.jobs)
    measuring = Measuring(study, args.samples, args.features, args.weights)
    runs = train_methods(study, methods, range(args.seeds))
    if not runs:
        raise UserError("no method was trained; the lines above give the reasons")
    results, pictures = measure_methods(measuring, methods, runs)
    settings = {
        "device": DEVICE,
        "shards": shards.location,
        "minutes": args.minutes,
        "seeds": args.seeds,
        "images": measuring.num,
        "features": args.features,
    }
    write_report(study.out, results, pictures, settings)


if __name__ == "__main__":
    main()
