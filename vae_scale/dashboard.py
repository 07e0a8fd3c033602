"""`python -m vae_scale.dashboard --run DIR`: saves a workspace for the run's wandb project."""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from vae_scale.errors import UserError, cli_main, one_line
from vae_scale.files import atomic_write


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vae_scale.dashboard",
        description="Save a workspace in the wandb project of a run: images, quality, loss, optimization, performance.",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of a run in the project")
    parser.add_argument("--entity", metavar="NAME", help="user or team (default: wandb's default entity)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the workspace to this file instead of saving it")
    return parser


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv`, which defaults to `sys.argv[1:]`."""
    args = _parser().parse_args(argv)
    if not find_spec("wandb_workspaces"):
        raise UserError("dashboard needs wandb-workspaces: pip install 'vae_scale[dashboard]'")
    if not (args.run / "config.yaml").is_file():
        raise UserError(f"--run {args.run}: not the folder of a run, as it holds no config.yaml")

    from vae_scale.config.parsing import parse
    from vae_scale.tracking.workspace import build_workspace

    project = parse(["--config", str(args.run / "config.yaml")])[0].track.project
    if args.json:
        workspace = build_workspace(args.entity or "", project)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(args.json, workspace._to_model().model_dump_json(by_alias=True, exclude_none=True, indent=2) + "\n")
        print(f"{args.json}: the workspace of project {project}")
        return

    import wandb

    try:
        entity = args.entity or wandb.Api(timeout=30).default_entity
        saved = build_workspace(entity, project).save()
    except Exception as error:  # wandb also raises the exceptions of its HTTP client
        advice = "log in with `wandb login`, or write the workspace to a file with --json"
        raise UserError(f"wandb: {one_line(error).rstrip('.'):.300}; {advice}") from None
    print(f"saved: {saved.url}")


if __name__ == "__main__":
    main()
