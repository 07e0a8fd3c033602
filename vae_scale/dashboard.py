"""`python -m vae_scale.dashboard --run DIR`: a saved workspace in wandb, with panels in reading order."""

import argparse
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from vae_scale.errors import UserError, command, one_line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vae_scale.dashboard",
        description="Save a workspace in the wandb project of a run: quality, pictures, loss, health and speed.",
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="folder of a run, which names the project")
    parser.add_argument("--entity", metavar="NAME", help="user or team (default: wandb's own)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what would be sent there, and send nothing")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. `argv` is the command line, by default the process's own."""
    args = _parser().parse_args(argv)
    if not find_spec("wandb_workspaces"):
        raise UserError("dashboard needs wandb-workspaces: pip install 'vae_scale[dashboard]'")
    if not (args.run / "config.yaml").is_file():
        raise UserError(f"--run {args.run}: not the folder of a run, as it holds no config.yaml")
    from vae_scale.config import parse

    project = parse(["--config", str(args.run / "config.yaml")])[0].track.project

    from vae_scale.reporting.workspace import as_json, workspace

    if args.json:
        content = as_json(workspace(args.entity or "", project))
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=2) + "\n")
        print(f"{args.json}: the workspace of project {project}")
        return
    print(f"saved: {_save(args.entity, project)}")


def _save(entity: str | None, project: str) -> str:
    """Saves the workspace of a project; returns its address.

    Raises:
        UserError: there is no key, or wandb does not take it.
    """
    import wandb

    from vae_scale.reporting.workspace import workspace

    try:
        api = wandb.Api(timeout=30)
        saved = workspace(entity or api.default_entity, project).save()
    except Exception as error:  # wandb raises whatever its transport does
        remedy = "log in with `wandb login`, or write the workspace to a file with --json"
        raise UserError(f"wandb: {one_line(error).rstrip('.'):.300}; {remedy}") from None
    return str(saved.url)


if __name__ == "__main__":
    main()
