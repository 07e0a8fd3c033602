"""`python -m vae_scale.export --run RUN --out DIR`: writes the decoder and the encoder for use without vae_scale."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vae_scale.errors import UserError, command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vae_scale.export",
        description="Write the decoder and the encoder of a trained VAE for use without vae_scale.",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--format",
        choices=["torch", "onnx", "diffusers"],
        default="torch",
        help="torch (default): programs for torch.export.load; onnx; diffusers: an AutoencoderKL, from network kl only",
    )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. `argv` is the command line, by default the process's own."""
    args = _parser().parse_args(argv)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out}: is a file; give a folder")

    from vae_scale.models.exporting import export
    from vae_scale.models.vae import VAE
    from vae_scale.training import checkpoint

    folder = checkpoint.newest_of(args.run, "--run")
    weights = "ema.safetensors"
    model = VAE.from_pretrained(folder, weights)
    source = {"checkpoint": str(folder), "weights": weights, "images_seen": checkpoint.images_of(folder)}
    parts = export(model, args.out, args.format, source)["parts"]
    told = ", ".join(f"{name} {part['largest_difference']:.1g}" for name, part in parts.items() if part["batches_compared"])
    print(f"{args.out}: {args.format}, from {folder}; largest difference from the model: {told or 'not compared'}")


if __name__ == "__main__":
    main()
