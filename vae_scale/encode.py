"""`python -m vae_scale.encode --run RUN --out DIR`: a set of images as latents, in one process or in many."""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vae_scale.errors import UserError, command

if TYPE_CHECKING:
    from accelerate import Accelerator

WEIGHTS = "ema.safetensors"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vae_scale.encode",
        description="Write the latents of images, mean and log-variance, as shards for other models. Run it again to carry on.",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--shards", metavar="PLACE", help="images, a folder or a URL (default: those of the run)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the latents")
    parser.add_argument("--splits", metavar="A,B", help="of the images (default: all)")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images at a time and process (default: 64)")
    parser.add_argument(
        "--precision",
        choices=["auto", "bf16", "fp32"],
        default="fp32",
        help="of the encoder; fp32 (default), as in evaluation, or auto, as in training; latents are written in fp32",
    )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. `argv` is the command line, by default the process's own."""
    args = _parser().parse_args(argv)
    if args.batch < 1:
        raise UserError(f"--batch is {args.batch}; it must be at least 1")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file; give a folder")

    from vae_scale.config import TrainConfig
    from vae_scale.training.launching import start

    accelerator = start(TrainConfig(precision=args.precision))
    told = _encode(args, accelerator)
    if accelerator.is_main_process:
        print(f"{args.out}: {told}")
    accelerator.end_training()


def _encode(args: argparse.Namespace, accelerator: "Accelerator") -> str:
    """Encodes this process's share; what was done."""
    from vae_scale.models.vae import VAE
    from vae_scale.training import checkpoint
    from vae_scale.training.encoding import encode_shards
    from vae_scale.training.evaluation import Processes, newest_for_all, open_images
    from vae_scale.training.launching import resolve_precision

    processes = Processes.of(accelerator)
    folder = newest_for_all(args.run, "--run", processes, accelerator.device)
    data = checkpoint.load(folder)[0]["config"]["data"]
    model = VAE.from_pretrained(folder, WEIGHTS).to(accelerator.device)
    shards = open_images(args.shards, data, model.resolution)
    if args.splits:
        wanted = [name.strip() for name in args.splits.split(",")]
        if unknown := [name for name in wanted if name not in shards.splits]:
            raise UserError(f"--splits: {shards.location} has no split {unknown[0]!r}; it has {', '.join(shards.splits)}")
        shards = shards.select(*wanted)
    with (folder / WEIGHTS).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    about = {
        "checkpoint": {"name": folder.name, "images_seen": checkpoint.images_of(folder), "weights": WEIGHTS, "sha256": sha256},
        "precision": resolve_precision(args.precision),
    }
    training = [name.strip() for name in data["train"].split(",")]
    on_gpu = accelerator.device.type == "cuda"
    with accelerator.autocast():
        written = encode_shards(model, shards, args.out, args.batch, about, training, processes, on_gpu)
    count = f"{len(shards):,} images in {len(shards.shards)} shards, from {folder}"
    return f"latents of {count}" if written else f"already complete: latents of {count}"


if __name__ == "__main__":
    main()
