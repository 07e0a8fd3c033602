"""`python -m vae_scale.sample --run RUN --num N --out FILE.png`: draws new images."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vae_scale.errors import UserError, command

ROWS = 8  # of --interpolate

if TYPE_CHECKING:
    from torch import Tensor

    from vae_scale.models.vae import VAE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vae_scale.sample",
        description="Draw new images from a trained VAE; the same seed gives the same.",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture to write")
    parser.add_argument("--num", type=int, default=64, metavar="N", help="images (default: 64)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="scale of the latents (default: 1)")
    parser.add_argument(
        "--prior", choices=["auto", "normal", "gmm"], default="auto", help="auto (default): the best the model has"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="B", help="images at a time (default: 64)")
    parser.add_argument("--save-images", type=Path, metavar="DIR", help="write each image as a file of its own, too")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--interpolate", action="store_true", help="rows of N images each, from one sample to another")
    what.add_argument("--reconstruct", action="store_true", help="N held-out images, each beside its reconstruction")
    parser.add_argument("--shards", metavar="DIR", help="shards for --reconstruct (default: those of the run)")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. `argv` is the command line, by default the process's own."""
    args = _parser().parse_args(argv)
    if args.num < 1 or args.batch_size < 1:
        raise UserError("--num and --batch-size must be at least 1")
    if args.temperature < 0:
        raise UserError(f"--temperature is {args.temperature}; it must not be negative")
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: must end in .png")

    import torch
    from PIL import Image

    from vae_scale.models.vae import VAE
    from vae_scale.training import checkpoint, pictures

    folder = checkpoint.newest(args.run)
    if folder is None:
        raise UserError(f"--run {args.run}: has no checkpoint yet; train it with python -m vae_scale.train --run {args.run}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = VAE.from_pretrained(folder, "ema.safetensors").to(device)
    columns = None
    if args.reconstruct:
        images, columns = _reconstructions(model, folder, args), 8
        told = "held-out images, each followed by its reconstruction"
    elif args.interpolate:
        images, columns = _interpolations(model, args), args.num
        told = "interpolations between samples"
    else:
        images = model.sample(args.num, args.seed, args.temperature, args.batch_size, args.prior)
        told = f"samples at temperature {args.temperature:g} from the prior {model.name_prior(args.prior)}"
    pictures.save_grid(images, args.out, columns)
    if args.save_images:
        args.save_images.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(pictures.to_uint8(images)):
            Image.fromarray(image).save(args.save_images / f"{number:06d}.png")
    print(f"{args.out}: {told}, from {folder}")


def _interpolations(model: "VAE", args: argparse.Namespace) -> "Tensor":
    """ROWS rows of `--num` images each, from one sample to the next."""
    import torch

    from vae_scale.models.vae import slerp

    latents = model.draw_latents(2 * ROWS, args.seed, args.temperature, args.prior)
    ways = torch.linspace(0, 1, args.num)
    path = torch.stack(
        [slerp(first, last, float(way)) for first, last in zip(*latents.split(ROWS), strict=True) for way in ways]
    )
    return model.decode_all(path, args.batch_size)


def _reconstructions(model: "VAE", checkpoint_folder: Path, args: argparse.Namespace) -> "Tensor":
    """`--num` held-out images, each followed by its reconstruction."""
    import torch

    from vae_scale.data.shards import ShardSet
    from vae_scale.data.stream import Reader
    from vae_scale.training import checkpoint, pictures
    from vae_scale.training.evaluation import read_images
    from vae_scale.training.objective import to_model

    state, _ = checkpoint.load(checkpoint_folder)
    data = state["config"]["data"]
    shards = ShardSet.open(args.shards or data["shards"]).select(data["test"])
    rows = range(min(args.num, len(shards)))
    originals = to_model(read_images(Reader(shards, keep=1), rows))
    device = next(model.parameters()).device
    with torch.inference_mode():
        parts = [model.reconstruct(part.to(device)).cpu() for part in originals.split(args.batch_size)]
    return pictures.side_by_side(originals, torch.cat(parts))


if __name__ == "__main__":
    main()
