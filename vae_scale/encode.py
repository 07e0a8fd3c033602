"""`python -m vae_scale.encode --run RUN --out DIR`: encodes images into shards of latents, in one process or several."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vae_scale.errors import UserError, cli_main
from vae_scale.files import sha256_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vae_scale.evaluation.loading import LoadedRun


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vae_scale.encode",
        description="Encode images into shards of latents (mean and log-variance). To resume, run the same command again.",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="run directory")
    parser.add_argument("--shards", metavar="LOCATION", help="folder or URL of the images (default: those of the run)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write the latents to")
    parser.add_argument("--splits", metavar="A,B", help="splits to encode (default: all)")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="batch size per process (default: 64)")
    parser.add_argument(
        "--precision",
        choices=["auto", "bf16", "fp32"],
        default="fp32",
        help="precision of the encoder (default: fp32; auto: as in training); latents are always written in fp32",
    )
    return parser


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv`, which defaults to `sys.argv[1:]`."""
    args = _parser().parse_args(argv)
    if args.batch < 1:
        raise UserError(f"--batch is {args.batch}; it must be at least 1")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file; give a folder")

    from vae_scale.evaluation.loading import start_command

    run, accelerator = start_command(args.run, args.precision)
    message = _encode(args, run, accelerator)
    if accelerator.is_main_process:
        print(f"{args.out}: {message}")
    accelerator.end_training()


def _encode(args: argparse.Namespace, run: "LoadedRun", accelerator: "Accelerator") -> str:
    """Encodes the images of this process and returns a summary."""
    from vae_scale.evaluation.encoding import encode_shards
    from vae_scale.models.pretrained import AVERAGED_WEIGHTS
    from vae_scale.runtime.launching import resolve_precision

    shards = run.open_shards(args.shards)
    if args.splits:
        splits = [name.strip() for name in args.splits.split(",")]
        if unknown := [name for name in splits if name not in shards.splits]:
            raise UserError(f"--splits: {shards.location} has no split {unknown[0]!r}; it has {', '.join(shards.splits)}")
        shards = shards.select(*splits)
    provenance = {
        "checkpoint": {
            "name": run.checkpoint_dir.name,
            "images_seen": run.images_seen,
            "weights": AVERAGED_WEIGHTS,
            "sha256": sha256_of(run.checkpoint_dir / AVERAGED_WEIGHTS),
        },
        "precision": resolve_precision(args.precision),
    }
    on_gpu = accelerator.device.type == "cuda"
    with accelerator.autocast():
        written = encode_shards(run.model, shards, args.out, args.batch, provenance, run.train_splits, run.dist, on_gpu)
    description = f"{len(shards):,} images in {len(shards.shards)} shards, from {run.checkpoint_dir}"
    return f"latents of {description}" if written else f"already complete: latents of {description}"


if __name__ == "__main__":
    main()
