"""`python -m vae_scale.evaluate --run RUN`: evaluates a trained VAE on held-out images, on one or many processes."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_scale.errors import UserError, cli_main
from vae_scale.files import write_json

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from vae_scale.evaluation.features import FeatureExtractor
    from vae_scale.evaluation.loading import LoadedRun
    from vae_scale.evaluation.reconstruction import ImageDistance

UNBIASED_IMAGES = 10_000  # below this, a note on the bias of the Frechet distance is printed (Chong & Forsyth, 2020)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vae_scale.evaluate",
        description="Evaluate a trained VAE: likelihood bounds, reconstructions and samples.",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--shards", metavar="LOCATION", help="folder or URL of the shards (default: those of the run)")
    parser.add_argument("--split", metavar="NAME", help="split to evaluate on (default: the run's held-out split)")
    parser.add_argument("--images", type=int, metavar="N", help="maximum number of images (default: all)")
    parser.add_argument("--samples", type=int, metavar="N", help="number of samples (default: the number of images)")
    importance = "latents per image of the importance-weighted bound; 0 disables it (default: 16)"
    parser.add_argument("--importance-samples", type=int, default=16, metavar="K", help=importance)
    parser.add_argument(
        "--features",
        choices=["efficientnet_lite0", "inception", "none"],
        default="efficientnet_lite0",
        help="network for Frechet distance, precision and recall; inception gives the FID (default: efficientnet_lite0)",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="weights of that network (default: packaged or downloaded)"
    )
    parser.add_argument("--prior", choices=["auto", "normal", "gmm", "flow"], default="auto", help="default: auto, the best")
    parser.add_argument("--steps", type=int, default=12, metavar="K", help="sampling steps of the flow (default: 12)")
    guidance = "scale of guidance (default: 2.5; 1: none); with several, the metrics of samples are lists"
    parser.add_argument("--guidance", type=float, nargs="+", metavar="G", help=guidance)
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="scale of the noise (default: 1)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="B", help="images per batch and process (default: 64)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report as JSON")
    return parser


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv`, which defaults to `sys.argv[1:]`."""
    args = _parser().parse_args(argv)
    for name in ("images", "samples", "steps", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if args.importance_samples < 0 or args.temperature < 0:
        raise UserError("--importance-samples and --temperature must not be negative")

    from vae_scale.evaluation.loading import start_command

    run, accelerator = start_command(args.run, "fp32")  # for results that are comparable between machines
    report = _evaluate(args, run, accelerator)
    if accelerator.is_main_process:
        _print_report(report)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.json, report)
    accelerator.end_training()


def _evaluate(args: argparse.Namespace, run: "LoadedRun", accelerator: "Accelerator") -> dict[str, Any]:
    """Returns the report; metrics of samples are missing on ranks other than 0."""
    import torch

    from vae_scale.evaluation.evaluator import ExtendedMetrics, evaluate
    from vae_scale.evaluation.frechet import frechet_distance
    from vae_scale.evaluation.neighbours import check_set_sizes, compute_prdc
    from vae_scale.evaluation.sampling import iterate_samples
    from vae_scale.models.vae import SamplingConfig

    model, dist, device = run.model, run.dist, accelerator.device
    shards = run.open_shards(args.shards).select(args.split or run.data["test"])
    images = min(args.images or len(shards), len(shards))
    samples, scales = args.samples or images, args.guidance or [None]
    samplings = [SamplingConfig(args.steps, guidance=scale) for scale in scales]
    priors = [model.describe_prior(args.prior, sampling) for sampling in samplings]  # raises before the long computations
    if args.features != "none":
        check_set_sizes(images, samples)
    report: dict[str, Any] = {
        "checkpoint": str(run.checkpoint_dir),
        "images_seen": run.images_seen,
        "shards": shards.location,
        "fingerprint": shards.fingerprint,
        "split": shards.shards[0].split,
        "resolution": model.resolution,
        "images": images,
        "importance_samples": args.importance_samples,
        "seed": args.seed,
        "features": args.features,
    }
    extractor, lpips = _load_networks(args, accelerator)
    features: dict[str, list[Tensor]] = {"real": [], "reconstructed": [], **{prior: [] for prior in priors}}

    def add_features(name: str, images: "Tensor") -> None:
        if extractor:
            features[name].append(dist.gather(extractor(images)).cpu())

    def on_batch(images: "Tensor", reconstructions: "Tensor") -> None:
        add_features("real", images)
        add_features("reconstructed", reconstructions)

    batch_size = min(args.batch_size, -(-images // dist.world_size))
    extended = ExtendedMetrics(args.importance_samples, lpips, on_batch)
    report |= evaluate(model, shards, images, batch_size, args.seed, dist, extended)
    if extractor is None:
        return report
    report |= {"samples": samples, "prior": _single_or_list(priors), "temperature": args.temperature}
    for prior, sampling in zip(priors, samplings, strict=True):

        def sample_latents(numbers: range, sampling: SamplingConfig = sampling) -> "Tensor":
            return model.sample_latents(numbers, args.seed, args.temperature, args.prior, sampling, args.batch_size)

        for _, batch in iterate_samples(model, sample_latents, samples, args.batch_size, dist):
            add_features(prior, batch)
    if accelerator.is_main_process:
        real, reconstructed = (torch.cat(features[name])[:images].to(device) for name in ("real", "reconstructed"))
        name = "fid" if args.features == "inception" else "frechet_distance"
        report[f"reconstruction_{name}"] = frechet_distance(reconstructed, real)
        results = []
        for prior in priors:
            fake = torch.cat(features[prior])[:samples].to(device)
            results.append({name: frechet_distance(fake, real)} | compute_prdc(real, fake))
        report |= {metric: _single_or_list([result[metric] for result in results]) for metric in results[0]}
    return report


def _single_or_list(values: list[Any]) -> Any:
    return values if len(values) > 1 else values[0]


def _load_networks(
    args: argparse.Namespace, accelerator: "Accelerator"
) -> "tuple[FeatureExtractor | None, ImageDistance | None]":
    from vae_scale.evaluation.features import load_extractor
    from vae_scale.evaluation.reconstruction import load_lpips

    extractor = lpips = None
    if args.features != "none":
        with accelerator.local_main_process_first():  # which may download the weights
            extractor = load_extractor(args.features, accelerator.device, args.weights)
    try:
        lpips = load_lpips(accelerator.device)
    except UserError as error:
        if accelerator.is_main_process:
            print(f"lpips is skipped: {error}", flush=True)
    return extractor, lpips


def _print_report(report: dict[str, Any]) -> None:
    width = max(map(len, report))
    for name, value in report.items():
        if any(isinstance(x, float) and not math.isfinite(x) for x in (value if isinstance(value, list) else [value])):
            raise UserError(f"{report['checkpoint']}: {name} is not finite; the model has diverged")
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        if isinstance(value, list):
            shown = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in value[:8])
            text = "; ".join(shown) + (f" ... ({len(value)})" if len(value) > 8 else "")
        print(f"{name:<{width}}  {text}")
    count = min(report["images"], report.get("samples", UNBIASED_IMAGES))
    if "samples" in report and count < UNBIASED_IMAGES:
        print(f"Frechet distances of {count:,} images are biased upwards: compare only those of equal numbers of images")


if __name__ == "__main__":
    main()
