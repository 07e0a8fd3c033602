"""`python -m vae_scale.sample --run RUN --num N --out FILE.png`: generates images, on one or many processes."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vae_scale.errors import UserError, cli_main

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from vae_scale.evaluation.loading import LoadedRun
    from vae_scale.models.vae import VAE

MAX_GRID_IMAGES = 1024  # samples in the grid if --save-images is given
COMPILE_MIN_SAMPLES = 4096  # samples per process from which compilation pays off (an estimate, not measured)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vae_scale.sample",
        description="Generate images with a trained VAE. The same seed gives the same images.",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="output file for the grid")
    parser.add_argument("--num", type=int, default=64, metavar="N", help="number of images (default: 64)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="scale of the noise (default: 1)")
    parser.add_argument("--prior", choices=["auto", "normal", "gmm", "flow"], default="auto", help="default: auto, the best")
    parser.add_argument("--grid", type=int, metavar="COLUMNS", help="columns of the grid (default: about square)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="B", help="images per batch and process (default: 64)")
    saved = f"also write each image as a file; limits the grid to the first {MAX_GRID_IMAGES:,} samples"
    parser.add_argument("--save-images", type=Path, metavar="DIR", help=saved)
    parser.add_argument(
        "--precision",
        choices=["auto", "bf16", "fp32"],
        default="fp32",
        help="default: fp32; auto: as in training",
    )
    flow = parser.add_argument_group("flow")
    flow.add_argument("--steps", type=int, default=12, metavar="K", help="sampling steps (default: 12)")
    flow.add_argument("--class", dest="class_name", metavar="NAME", help="class to sample, by name or index")
    guidance = "scale by which samples are moved away from those of an earlier state of the flow (default: 2.5; 1: none)"
    flow.add_argument("--guidance", type=float, metavar="G", help=guidance)
    grids = parser.add_argument_group("other grids")
    mode = grids.add_mutually_exclusive_group()
    mode.add_argument("--interpolate", nargs="*", metavar="PHOTO", help="N steps between samples, or between two photos")
    mode.add_argument("--traverse", action="store_true", help="N steps along each principal direction of the prior")
    mode.add_argument("--reconstruct", action="store_true", help="N held-out images, each beside its reconstruction")
    mode.add_argument("--neighbours", action="store_true", help="N samples, each beside its nearest training images")
    grids.add_argument("--shards", metavar="LOCATION", help="shards for --reconstruct and --neighbours (default: the run's)")
    grids.add_argument(
        "--gif", type=Path, metavar="FILE.gif", help="animate the steps, or the sample grids of the training run"
    )
    return parser


def _check_args(args: argparse.Namespace) -> None:
    for name in ("num", "batch_size", "steps", "grid"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if args.temperature < 0:
        raise UserError(f"--temperature is {args.temperature}; it must not be negative")
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: must end in .png")
    if args.gif and args.gif.suffix.lower() != ".gif":
        raise UserError(f"--gif {args.gif}: must end in .gif")
    if args.gif and (args.reconstruct or args.neighbours):
        raise UserError("--gif requires samples, --interpolate or --traverse")
    if args.interpolate and len(args.interpolate) != 2:
        raise UserError("--interpolate requires two photos, or none to interpolate between samples")


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv`, which defaults to `sys.argv[1:]`."""
    args = _parser().parse_args(argv)
    _check_args(args)

    from vae_scale.evaluation.loading import start_command

    run, accelerator = start_command(args.run, args.precision)
    with accelerator.autocast():
        message = _sample(args, run, accelerator)
    if accelerator.is_main_process:
        print(f"{args.out}: {message}, from {run.checkpoint_dir}")
    accelerator.end_training()


def _sample(args: argparse.Namespace, run: "LoadedRun", accelerator: "Accelerator") -> str:
    """Writes the requested images. Returns a description of them."""
    from PIL import Image

    from vae_scale.evaluation.image_grids import render_grid, save_gif, save_grid, save_images, to_uint8
    from vae_scale.evaluation.sampling import sample_images
    from vae_scale.models.vae import SamplingConfig

    model, dist = run.model, run.dist
    sampling = SamplingConfig(args.steps, _class_index(model, args.class_name), args.guidance)
    prior = f"the prior {model.describe_prior(args.prior, sampling)}"

    def sample_latents(num: int | range) -> "Tensor":
        return model.sample_latents(num, args.seed, args.temperature, args.prior, sampling, args.batch_size)

    if args.interpolate is None and not (args.traverse or args.reconstruct or args.neighbours):
        keep = min(args.num, MAX_GRID_IMAGES) if args.save_images else args.num
        compiled = accelerator.device.type == "cuda" and args.num >= COMPILE_MIN_SAMPLES * dist.world_size
        samples = sample_images(model, sample_latents, args.num, args.batch_size, keep, args.save_images, dist, compiled)
        if samples is not None:
            save_grid(samples, args.out, args.grid)
            if args.gif:
                files = sorted((args.run / "samples").glob("samples_*.png"))
                if not files:
                    raise UserError(f"--gif {args.gif}: the run's folder samples/ has no images yet")
                save_gif([Image.open(file).convert("RGB") for file in files], args.gif, milliseconds=500)
        subset = "" if keep == args.num else f"the first {keep:,} of {args.num:,} "
        return f"{subset}samples at temperature {args.temperature:g} from {prior}"
    if dist.rank:  # the other grids are computed on rank 0
        return ""
    images, columns, message = _make_grid(args, run, sample_latents, prior)
    save_grid(images, args.out, args.grid or columns)
    if args.save_images:
        save_images(to_uint8(images), args.save_images)
    if args.gif:
        sequences = images.unflatten(0, (-1, args.num))
        frames = [render_grid(step) for step in sequences.unbind(1)]
        save_gif(frames + frames[-2:0:-1], args.gif, milliseconds=120)  # forwards and backwards
    return message


def _make_grid(
    args: argparse.Namespace, run: "LoadedRun", sample_latents: "Callable[[int], Tensor]", prior: str
) -> "tuple[Tensor, int, str]":
    """Returns the images of a grid other than plain samples, its number of columns and a description."""
    from vae_scale.evaluation import gallery

    model = run.model
    if args.reconstruct:
        test_set = run.open_shards(args.shards).select(run.data["test"])
        images = gallery.reconstruct_pairs(model, test_set, args.num, args.batch_size)
        return images, gallery.ROWS, "held-out images, each followed by its reconstruction"
    if args.neighbours:
        from vae_scale.evaluation.features import load_extractor

        train_set = run.open_shards(args.shards).select(*run.train_splits)
        samples = model.decode_batches(sample_latents(args.num), args.batch_size)
        images = gallery.retrieve_neighbours(samples, train_set, load_extractor("efficientnet_lite0"), args.batch_size)
        return images, gallery.NUM_NEIGHBOURS + 1, f"samples from {prior}, each followed by its nearest training images"
    if args.traverse:
        images = gallery.traverse(model, sample_latents, args.num, args.batch_size)
        return images, args.num, f"traversals along principal directions of {prior}"
    if photos := [Path(name) for name in args.interpolate]:
        latents, message = gallery.encode_photos(model, photos), f"interpolation from {photos[0]} to {photos[1]}"
    else:
        latents, message = sample_latents(2 * gallery.ROWS), "interpolations between samples"
    return gallery.interpolate(model, latents, args.num, args.batch_size), args.num, message


def _class_index(model: "VAE", class_name: str | None) -> int | None:
    """Returns the index of a class given by name or index."""
    if class_name is None:
        return None
    names = list(model.class_names)
    if not names:
        raise UserError("--class: this model has no class-conditional flow")
    if class_name in names:
        return names.index(class_name)
    if class_name.isdigit() and int(class_name) < len(names):
        return int(class_name)
    raise UserError(f"--class {class_name}: not one of {', '.join(names)}, and not an index below {len(names)}")


if __name__ == "__main__":
    main()
