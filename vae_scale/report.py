"""`python -m vae_scale.report RUN [RUN ...]`: one HTML file that shows runs side by side, without any network."""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from vae_scale.errors import UserError, command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vae_scale.report",
        description="Write a page that shows runs: curves, pictures, configuration and faults, side by side.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="default: report.html in the first run's folder")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. `argv` is the command line, by default the process's own."""
    args = _parser().parse_args(argv)
    out: Path = args.out or args.runs[0] / "report.html"
    if out.suffix.lower() != ".html":
        raise UserError(f"--out {out}: must end in .html")
    for package in ("plotly", "jinja2"):
        if not find_spec(package):
            raise UserError(f"report needs {package}: pip install 'vae_scale[report]'")

    from vae_scale.reporting.page import write
    from vae_scale.reporting.runs import read_runs

    runs = read_runs(args.runs)
    write(runs, out)
    print(f"{out}: {', '.join(run.name for run in runs)}; open it in a browser")


if __name__ == "__main__":
    main()
