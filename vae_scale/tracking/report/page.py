"""The self-contained HTML page of a report."""

import base64
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from vae_scale import __version__
from vae_scale.errors import UserError
from vae_scale.files import atomic_write
from vae_scale.tracking.report import charts
from vae_scale.tracking.report.runs import IMAGE_KINDS, Run

SUMMARY_METRICS = {  # metric: label, format
    "eval/bits_per_dim": ("held-out bits/dim", ".3f"),
    "eval/psnr": ("held-out PSNR (dB)", ".1f"),
    "eval/velocity_error": ("held-out velocity error", ".4f"),
    "perf/images_per_second": ("images/s", ",.0f"),
}


def write_report(runs: Sequence[Run], out: Path) -> None:
    """Writes the page to `out`.

    Raises:
        UserError: `out` cannot be written.
    """
    content = _render(runs)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out, content)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another file with --out") from None


def _render(runs: Sequence[Run]) -> str:
    package = files(__package__)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "run")
    options = {key: [run.config.get(key, "-") for run in runs] for key in keys}
    return environment.from_string((package / "page.html").read_text("utf-8")).render(
        runs=runs,
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        css=Markup((package / "page.css").read_text("utf-8")),
        scripts=[Markup(get_plotlyjs()), Markup((package / "page.js").read_text("utf-8"))],
        colors=[charts.run_color(index) for index in range(len(runs))],
        summary=_summary(runs),
        charts=charts.metric_charts(runs),
        kinds=[kind for kind in IMAGE_KINDS if any(run.images[kind] for run in runs)],
        options=options,
        differing={key: values for key, values in options.items() if len(set(values)) > 1},
        created=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=__version__,
    )


def _summary(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Returns the newest values of the most important metrics, one per run, by label."""
    summary = {"images seen": [f"{run.images_seen:,}" for run in runs]}
    for metric, (label, style) in SUMMARY_METRICS.items():
        if any(metric in run.curves for run in runs):
            summary[label] = [format(run.curves[metric][-1][1], style) if metric in run.curves else "-" for run in runs]
    return summary
