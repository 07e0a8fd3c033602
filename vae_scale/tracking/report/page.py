"""The self-contained HTML page of a report."""

import base64
import re
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

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
    "eval/psnr": ("dB PSNR, held-out", ".1f"),
    "eval/velocity_error": ("held-out velocity error", ".4f"),
    "perf/images_per_second": ("images/s", ",.0f"),
}


class Gallery(NamedTuple):
    """The images of one kind."""

    title: str
    positions: list[int]  # images seen at each position of the slider
    columns: list[list[tuple[int, str]]]  # per run: (images seen, data URI)


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
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["time"] = _format_time
    keys = list(dict.fromkeys(key for run in runs for key in run.config if key != "run"))
    options = {key: [run.config.get(key, "-") for run in runs] for key in keys}
    sections: dict[str, list[str]] = {"": []}
    for key in keys:
        sections.setdefault(key.rpartition(".")[0], []).append(key)
    return environment.from_string((package / "page.html").read_text("utf-8")).render(
        runs=runs,
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        css=Markup((package / "page.css").read_text("utf-8")),
        scripts=[Markup(get_plotlyjs()), Markup((package / "page.js").read_text("utf-8"))],
        colors=[charts.run_color(index) for index in range(len(runs))],
        summaries=[_summary(run) for run in runs],
        facts=[_facts(run) for run in runs],
        charts=charts.metric_charts(runs),
        galleries=[_gallery(kind, runs) for kind in IMAGE_KINDS if any(run.images[kind] for run in runs)],
        channel_charts=[charts.channel_chart(run, index) for index, run in enumerate(runs)],
        event_counts=[Counter(event["event"] for event in run.events) for run in runs],
        options=options,
        differing=[key for key, values in options.items() if len(set(values)) > 1],
        sections=sections,
        created=datetime.now(UTC).isoformat(),
        version=__version__,
    )


def _format_time(text: str) -> str:
    return f"{datetime.fromisoformat(text).astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _summary(run: Run) -> list[tuple[str, str]]:
    """Returns (value, label) of the most important metrics."""
    summary = [(f"{run.images_seen:,}", f"of {int(run.config.get('train.images', 0)):,} images")]
    return summary + [
        (format(run.curves[metric][-1][1], style), label)
        for metric, (label, style) in SUMMARY_METRICS.items()
        if metric in run.curves
    ]


def _facts(run: Run) -> dict[str, str]:
    """Returns further properties of a run, by label."""
    versions = ", ".join(f"{package} {version}" for package, version in run.state.get("versions", {}).items())
    facts = {
        "Precision": run.config.get("train.precision", ""),
        "Seed": run.config.get("seed", ""),
        "Processes": str(run.state.get("processes", "")),
        "Versions": re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30}\b", r"\1", versions),  # shortens commits
        "Folder": str(run.folder),
    }
    for event in run.events[:1] + run.events[-1:]:
        if event["event"] in ("started", "finished", "stopped", "failed"):
            facts[event["event"].capitalize()] = _format_time(event["time"])
    return {label: value for label, value in facts.items() if value}


def _gallery(kind: str, runs: Sequence[Run]) -> Gallery:
    columns = [
        [(images_seen, f"data:image/png;base64,{base64.b64encode(png).decode()}") for images_seen, png in run.images[kind]]
        for run in runs
    ]
    return Gallery(kind.capitalize(), sorted({images_seen for column in columns for images_seen, _ in column}), columns)
