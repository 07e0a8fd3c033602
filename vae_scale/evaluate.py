"""`python -m vae_scale.evaluate --run RUN`: measures a trained VAE on held-out images, in one process or in many."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_scale.errors import UserError, command

FEW = 10_000  # images, below which a note says that the Frechet distance is biased (Chong & Forsyth, 2020)

if TYPE_CHECKING:
    import torch

    from vae_scale.metrics.features import Extractor
    from vae_scale.metrics.reconstruction import Perceptual
    from vae_scale.training.evaluation import Processes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vae_scale.evaluate",
        description="Measure a trained VAE: its bounds on the likelihood, its reconstructions and its samples.",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--shards", metavar="PLACE", help="shards, a folder or a URL (default: those of the run)")
    parser.add_argument("--split", metavar="NAME", help="images to compare with (default: those the run held out)")
    parser.add_argument("--images", type=int, metavar="N", help="of the split, at most (default: all)")
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="to draw (default: as many as images; compare only Frechet distances of equal numbers, few bias them upwards)",
    )
    parser.add_argument(
        "--importance",
        type=int,
        default=16,
        metavar="K",
        help="latents per image of the importance-weighted bound; the time of K evaluations, 0 leaves it out (default: 16)",
    )
    parser.add_argument(
        "--features",
        choices=["efficientnet_lite0", "inception", "none"],
        default="efficientnet_lite0",
        help="network that describes images for the Frechet distance and for precision and recall (default: "
        "efficientnet_lite0, which needs no download; inception for the FID; none leaves them out)",
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of that network (default: its own, or downloaded)")
    parser.add_argument(
        "--prior", choices=["auto", "normal", "gmm", "flow"], default="auto", help="auto (default): the best the model has"
    )
    parser.add_argument("--steps", type=int, default=25, metavar="K", help="of the flow, from noise to a latent (default: 25)")
    parser.add_argument("--solver", choices=["heun", "euler"], default="heun", help="of the flow (default: heun)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="scale of the latents (default: 1)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="B", help="images at a time and process (default: 64)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all that is drawn (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON, too")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. `argv` is the command line, by default the process's own."""
    args = _parser().parse_args(argv)
    for name in ("images", "samples", "steps", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if args.importance < 0 or args.temperature < 0:
        raise UserError("--importance and --temperature must not be negative")

    from vae_scale.config import TrainConfig
    from vae_scale.training.evaluation import Processes
    from vae_scale.training.launching import device_of, start

    accelerator = start(TrainConfig(precision="fp32"))  # figures to compare with those of other machines
    report = _measure(args, device_of(accelerator), Processes.of(accelerator))
    if accelerator.is_main_process:
        _tell(report, args.json)
    accelerator.end_training()


def _measure(args: argparse.Namespace, device: "torch.device", processes: "Processes") -> dict[str, Any]:
    """The report; on ranks other than 0 without what needs all samples."""

    from vae_scale.metrics.frechet import Moments, frechet_distance
    from vae_scale.metrics.neighbours import compare, require
    from vae_scale.models.vae import VAE, Sampler
    from vae_scale.training import checkpoint
    from vae_scale.training.assessment import decoded_features, describe, reference_features
    from vae_scale.training.evaluation import newest_for_all, open_images

    folder = newest_for_all(args.run, "--run", processes, device)
    state, _ = checkpoint.load(folder)
    model = VAE.from_pretrained(folder, "ema.safetensors").to(device)
    data = state["config"]["data"]
    shards = open_images(args.shards, data, model.resolution).select(args.split or data["test"])
    images = min(args.images or len(shards), len(shards))
    samples, sampler = args.samples or images, Sampler(args.steps, args.solver)
    prior = model.name_prior(args.prior, sampler)  # what cannot be had is told before the long work
    if args.features != "none":
        require(images, samples)
    report: dict[str, Any] = {
        "checkpoint": str(folder),
        "images_seen": checkpoint.images_of(folder),
        "shards": shards.location,
        "fingerprint": shards.fingerprint,
        "split": shards.shards[0].split,
        "resolution": model.resolution,
        "images": images,
        "importance": args.importance,
        "seed": args.seed,
        "features": args.features,
    }
    extractor, perceptual = _networks(args, device, processes)
    batch, drawn_batch = (min(args.batch_size, -(-count // processes.ranks)) for count in (images, samples))
    measured, reconstructions = describe(
        model, shards, images, batch, args.seed, args.importance, extractor, perceptual, processes
    )
    report |= measured
    if extractor is None or reconstructions is None:
        return report
    report |= {"samples": samples, "prior": prior, "temperature": args.temperature}
    reference = reference_features(extractor, shards, images, batch, processes, device)

    def draw(numbers: range) -> "torch.Tensor":
        return model.draw_latents(numbers, args.seed, args.temperature, args.prior, sampler, drawn_batch)

    drawn = decoded_features(model, extractor, draw, samples, drawn_batch, processes)
    if reference is not None and drawn is not None:
        name = "fid" if extractor.name == "inception" else "frechet_distance"
        reference, drawn = reference.to(device), drawn.to(device)
        real = Moments.of(reference)
        report[name] = frechet_distance(Moments.of(drawn), real)
        report[f"reconstruction_{name}"] = frechet_distance(reconstructions, real)
        report |= compare(reference, drawn)
    return report


def _networks(
    args: argparse.Namespace, device: "torch.device", processes: "Processes"
) -> "tuple[Extractor | None, Perceptual | None]":
    """The networks that look at images, as far as they are wanted and there."""
    import torch

    from vae_scale.metrics.features import load_extractor
    from vae_scale.metrics.reconstruction import load_lpips

    extractor = perceptual = None
    if args.features != "none":
        # One rank after the other would wait for the download of the first; and the others find the file.
        for rank in (0, 1):
            if min(processes.rank, 1) == rank:
                extractor = load_extractor(args.features, device, args.weights)
            processes.add_up(torch.zeros((), device=device))
    try:
        perceptual = load_lpips(device)
    except UserError as error:
        if processes.rank == 0:
            print(f"lpips is left out: {error}", flush=True)
    return extractor, perceptual


def _tell(report: dict[str, Any], path: Path | None) -> None:
    """Prints the report and writes it to `path`."""
    for name, value in report.items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise UserError(f"{report['checkpoint']}: {name} is not finite; the model or its training went wrong")
    width = max(map(len, report))
    for name, value in report.items():
        print(f"{name:<{width}}  {_shown(value)}")
    fewest = min(report["images"], report.get("samples", FEW))
    if "samples" in report and fewest < FEW:
        print(f"Frechet distances of {fewest:,} images are biased upwards: compare only those of the same numbers of images")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
        temporary.replace(path)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{number:.4g}" for number in value[:8]) + (f" ... ({len(value)})" if len(value) > 8 else "")
    return f"{value:.6g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
