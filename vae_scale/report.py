"""`python -m vae_scale.report RUN [RUN ...]`: writes a self-contained HTML file that compares runs."""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from vae_scale.errors import UserError, cli_main


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vae_scale.report",
        description="Write an HTML page that compares runs: curves, images, events and configuration.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="default: report.html in the first run's folder")
    return parser


@cli_main
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv`, which defaults to `sys.argv[1:]`."""
    args = _parser().parse_args(argv)
    out: Path = args.out or args.runs[0] / "report.html"
    if out.suffix.lower() != ".html":
        raise UserError(f"--out {out}: must end in .html")
    for package in ("plotly", "jinja2"):
        if not find_spec(package):
            raise UserError(f"report needs {package}: pip install 'vae_scale[report]'")

    from vae_scale.tracking.report.page import write_report
    from vae_scale.tracking.report.runs import read_runs

    runs = read_runs(args.runs)
    write_report(runs, out)
    print(f"{out}: report of {', '.join(run.name for run in runs)}")


if __name__ == "__main__":
    main()
