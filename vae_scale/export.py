"""`python -m vae_scale.export --run RUN --out DIR`: exports the decoder and the encoder for use without vae_scale."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vae_scale.errors import UserError, cli_main


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vae_scale.export",
        description="Export the decoder and the encoder of a trained VAE for use without vae_scale.",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--format",
        choices=["torch", "onnx", "diffusers"],
        default="torch",
        help="torch (default): programs for torch.export.load; onnx; diffusers: an AutoencoderKL, for network kl only",
    )
    return parser


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv`, which defaults to `sys.argv[1:]`."""
    args = _parser().parse_args(argv)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file; give a folder")

    from vae_scale.evaluation.loading import load_run
    from vae_scale.models.exporting import export_model
    from vae_scale.models.pretrained import AVERAGED_WEIGHTS

    run = load_run(args.run)
    source = {"checkpoint": str(run.checkpoint_dir), "weights": AVERAGED_WEIGHTS, "images_seen": run.images_seen}
    parts = export_model(run.model, args.out, args.format, source).get("parts", {})
    differences = ", ".join(f"{name} {part['max_difference']:.1g}" for name, part in parts.items())
    print(f"{args.out}: {args.format}, from {run.checkpoint_dir}")
    if parts:
        print(f"maximum difference from the model: {differences}")


if __name__ == "__main__":
    main()
