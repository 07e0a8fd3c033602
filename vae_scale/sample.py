"""`python -m vae_scale.sample --run RUN --num N --out FILE.png`: draws new images, in one process or in many."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vae_scale.errors import UserError, command

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from vae_scale.models.vae import VAE

PICTURED = 1024  # samples in the picture, at most, where each is written as a file, too
COMPILED_FROM = 4096  # samples of a process; fewer are drawn sooner than compiled (a guess, not measured on a GPU)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vae_scale.sample",
        description="Draw new images from a trained VAE; the same seed gives the same.",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture to write")
    parser.add_argument("--num", type=int, default=64, metavar="N", help="images (default: 64)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="scale of the noise (default: 1)")
    parser.add_argument(
        "--prior", choices=["auto", "normal", "gmm", "flow"], default="auto", help="auto (default): the best the model has"
    )
    parser.add_argument("--grid", type=int, metavar="COLUMNS", help="columns of the picture (default: as many as rows)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="B", help="images at a time and process (default: 64)")
    parser.add_argument(
        "--save-images",
        type=Path,
        metavar="DIR",
        help=f"write each image as a file of its own, too; the picture then has the first {PICTURED:,} samples at most",
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "bf16", "fp32"],
        default="fp32",
        help="of the networks; fp32 (default), as in evaluation, or auto, as in training",
    )
    flow = parser.add_argument_group("the flow")
    flow.add_argument("--steps", type=int, default=25, metavar="K", help="steps from noise to a latent (default: 25)")
    flow.add_argument("--solver", choices=["heun", "euler"], default="heun", help="default: heun; euler takes half the time")
    flow.add_argument("--class", dest="label", metavar="NAME", help="images of this class only, by name or number")
    flow.add_argument("--guidance", type=float, default=1.0, metavar="G", help="how strongly that class is wanted (default: 1)")
    other = parser.add_argument_group("other pictures")
    what = other.add_mutually_exclusive_group()
    what.add_argument(
        "--interpolate",
        nargs="*",
        metavar="PHOTO",
        help="ways of N images each, from one sample to another, or from the first photograph to the second",
    )
    what.add_argument("--traverse", action="store_true", help="ways of N images each through a sample, along main directions")
    what.add_argument("--reconstruct", action="store_true", help="N held-out images, each beside its reconstruction")
    what.add_argument("--neighbours", action="store_true", help="N samples, each beside the training images most like it")
    other.add_argument("--shards", metavar="PLACE", help="shards for the last two (default: those of the run)")
    other.add_argument(
        "--gif", type=Path, metavar="FILE.gif", help="animate the ways, too; with neither, the samples as training went on"
    )
    return parser


def _check(args: argparse.Namespace) -> None:
    if args.num < 1 or args.batch_size < 1 or args.steps < 1:
        raise UserError("--num, --batch-size and --steps must be at least 1")
    if args.grid is not None and args.grid < 1:
        raise UserError("--grid must be at least 1")
    if args.temperature < 0:
        raise UserError(f"--temperature is {args.temperature}; it must not be negative")
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: must end in .png")
    if args.gif and args.gif.suffix.lower() != ".gif":
        raise UserError(f"--gif {args.gif}: must end in .gif")
    if args.gif and (args.reconstruct or args.neighbours):
        raise UserError("--gif animates samples, --interpolate or --traverse")
    if args.interpolate and len(args.interpolate) != 2:
        raise UserError("--interpolate takes two photographs, or none for ways between samples")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. `argv` is the command line, by default the process's own."""
    args = _parser().parse_args(argv)
    _check(args)

    from vae_scale.config import TrainConfig
    from vae_scale.training.launching import start

    accelerator = start(TrainConfig(precision=args.precision))
    with accelerator.autocast():
        told = _run(args, accelerator)
    if accelerator.is_main_process:
        print(f"{args.out}: {told}")
    accelerator.end_training()


def _run(args: argparse.Namespace, accelerator: "Accelerator") -> str:
    """Writes what is wanted, this process's share of it; what that is."""
    from vae_scale.models.vae import VAE, Sampler
    from vae_scale.training import pictures
    from vae_scale.training.evaluation import Processes, newest_for_all
    from vae_scale.training.sampling import draw_images, save_images

    processes = Processes.of(accelerator)
    folder = newest_for_all(args.run, "--run", processes, accelerator.device)
    model = VAE.from_pretrained(folder, "ema.safetensors").to(accelerator.device)
    sampler = Sampler(args.steps, args.solver, _label(model, args.label), args.guidance)
    prior = f"the prior {model.name_prior(args.prior, sampler)}"

    def draw(num: int | range) -> "Tensor":
        return model.draw_latents(num, args.seed, args.temperature, args.prior, sampler, args.batch_size)

    if args.interpolate is None and not (args.traverse or args.reconstruct or args.neighbours):
        kept = min(args.num, PICTURED) if args.save_images else args.num
        compiled = accelerator.device.type == "cuda" and args.num >= COMPILED_FROM * processes.ranks
        samples = draw_images(model, draw, args.num, args.batch_size, kept, args.save_images, processes, compiled)
        if samples is not None:
            pictures.save_grid(samples, args.out, args.grid)
            if args.gif:
                pictures.animate_files(sorted((args.run / "samples").glob("samples_*.png")), args.gif)
        some = "" if kept == args.num else f"the first {kept:,} of {args.num:,} "
        return f"{some}samples at temperature {args.temperature:g} from {prior}, from {folder}"
    if processes.rank:  # the other pictures are small; the first process draws them
        return ""
    images, columns, told = _draw(model, folder, draw, prior, args)
    pictures.save_grid(images, args.out, args.grid or columns)
    if args.save_images:
        save_images(pictures.to_uint8(images), args.save_images)
    if args.gif:
        pictures.animate_ways(images.unflatten(0, (-1, args.num)), args.gif)
    return f"{told}, from {folder}"


def _draw(
    model: "VAE", folder: Path, draw: "Callable[[int], Tensor]", prior: str, args: argparse.Namespace
) -> "tuple[Tensor, int, str]":
    """The images of another picture than plain samples, in how many columns, and what they are."""
    from vae_scale.training import checkpoint, gallery
    from vae_scale.training.evaluation import open_images

    if args.reconstruct or args.neighbours:
        data = checkpoint.load(folder)[0]["config"]["data"]
        shards = open_images(args.shards, data, model.resolution)
        if args.reconstruct:
            told = "held-out images, each followed by its reconstruction"
            return gallery.reconstructions(model, shards.select(data["test"]), args.num, args.batch_size), 8, told
        from vae_scale.metrics.features import load_extractor

        extractor = load_extractor("efficientnet_lite0")
        samples = model.decode_all(draw(args.num), args.batch_size)
        seen = shards.select(*(name.strip() for name in data["train"].split(",")))
        told = f"samples from {prior}, each followed by the training images most like it"
        return gallery.neighbours(samples, seen, extractor, args.batch_size), gallery.NEIGHBOURS + 1, told
    if args.traverse:
        return gallery.traversals(model, draw, args.num, args.batch_size), args.num, f"main directions of {prior}"
    photographs = [Path(name) for name in args.interpolate]
    ends = gallery.encode_photographs(model, photographs) if photographs else draw(2 * gallery.ROWS)
    told = f"the way from {photographs[0]} to {photographs[1]}" if photographs else "interpolations between samples"
    return gallery.interpolations(model, ends, args.num, args.batch_size), args.num, told


def _label(model: "VAE", wanted: str | None) -> int | None:
    """The number of the class `wanted`, given by name or number."""
    if wanted is None:
        return None
    names = list(model.class_names)
    if not names:
        raise UserError("--class: this model has no flow that knows classes; leave it out")
    if wanted in names:
        return names.index(wanted)
    if wanted.isdigit() and int(wanted) < len(names):
        return int(wanted)
    raise UserError(f"--class {wanted}: not one of {', '.join(names)}, nor a number below {len(names)}")


if __name__ == "__main__":
    main()
