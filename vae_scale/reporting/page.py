"""Runs as one HTML file, with all that it needs in it."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from vae_scale import __version__
from vae_scale.errors import UserError
from vae_scale.reporting import charts
from vae_scale.reporting.runs import KINDS, Run

HEADLINES = (  # the first metric that a run has, what it is called, how it is written
    ((("eval/bits_per_dim", "held-out bits/dim"), ("train/bits_per_dim", "training bits/dim"), ("train/loss", "loss")), ".3f"),
    ((("eval/psnr_db", "dB PSNR, held-out"),), ".1f"),
    ((("speed/images_per_second", "images/s"),), ",.0f"),
)
FAULTS = {
    "resumed": ("resume", "resumes"),
    "stopped": ("stop", "stops"),
    "failed": ("failure", "failures"),
    "left_out": ("report of steps left out", "reports of steps left out"),
    "missing_images": ("report of missing images", "reports of missing images"),
    "straggler": ("straggler", "stragglers"),
    "not_saved": ("checkpoint not saved", "checkpoints not saved"),
}


@dataclass(frozen=True)
class Gallery:
    """Pictures of one kind, run by run.

    Attributes:
        title: What they show.
        images: Numbers of images seen at which any run has one, in order: the places of the slider.
        columns: For each run its pictures, images seen and data URI, in order.
        notes: For each run, what is not shown.
    """

    title: str
    images: list[int]
    columns: list[list[tuple[int, str]]]
    notes: list[str]


def write(runs: Sequence[Run], out: Path) -> None:
    """Writes the page, aside first, so that `out` is the old one or the whole new one.

    Raises:
        UserError: `out` cannot be written.
    """
    temporary = out.with_name(f"{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # it may be a link to elsewhere; a new file is made instead of writing through it
        try:
            with temporary.open("xb") as file:
                _fill(runs).dump(file, "utf-8", "replace")
            temporary.replace(out)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another file with --out") from None


def _fill(runs: Sequence[Run]) -> jinja2.environment.TemplateStream:
    """The page, piece by piece."""
    here = files(__package__)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["time"] = _time
    template = environment.from_string((here / "page.html").read_text("utf-8"))
    keys = list(dict.fromkeys(key for run in runs for key in run.config if key != "run"))
    table = {key: [run.config.get(key, "-") for run in runs] for key in keys}
    drawn = charts.curve_charts(runs)
    return template.stream(
        runs=runs,
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared",
        css=Markup((here / "page.css").read_text("utf-8")),
        scripts=[Markup(get_plotlyjs()), Markup((here / "page.js").read_text("utf-8"))],
        colours=[charts.colour(number) for number in range(len(runs))],
        headlines=[_headlines(run) for run in runs],
        facts=[_facts(run) for run in runs],
        groups={group: [chart for chart in drawn if chart.group == group] for group in charts.GROUPS},
        galleries=[_gallery(kind, runs) for kind in KINDS if any(run.pictures.get(kind) for run in runs)],
        channels=[charts.channel_chart(run, number) for number, run in enumerate(runs)],
        table=table,
        differing=[key for key, values in table.items() if len(set(values)) > 1],
        sections=_sections(keys),
        faults=[_faults(run) for run in runs],
        written=datetime.now(UTC).isoformat(),
        version=__version__,
    )


def _time(text: str) -> str:
    """An ISO time, for people; another text as it is."""
    try:
        return f"{datetime.fromisoformat(text).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError):
        return text


def _headlines(run: Run) -> list[tuple[str, str]]:
    """The figures to see first: value and name."""
    wanted = run.config.get("train.images", "")
    found = [(f"{run.images_seen:,}", f"of {int(wanted):,} images" if wanted.isdecimal() else "images seen")]
    for metrics, style in HEADLINES:
        for key, name in metrics:
            if key in run.curves:
                found.append((format(run.curves[key].last, style), name))
                break
    return found


def _facts(run: Run) -> dict[str, str]:
    """What else is known of a run."""
    versions = run.state.get("versions")
    told = ", ".join(f"{name} {number}" for name, number in versions.items()) if isinstance(versions, dict) else ""
    ended = run.events[-1] if run.events and run.events[-1].kind in ("finished", "stopped", "failed") else None
    facts = {
        "Parameters": f"{run.parameters / 1e6:,.3g} million" if run.parameters else "",
        "Precision": run.config.get("train.precision", ""),
        "Seed": run.config.get("seed", ""),
        "Processes": str(run.state.get("processes", "")),
        "Versions": re.sub(r"\b([0-9a-f]{10})[0-9a-f]{30}\b", r"\1", told),  # commits as git shortens them
        "Started": _time(run.started),
        ended.kind.capitalize() if ended else "Ended": _time(ended.time) if ended else "",
        "Folder": str(run.folder),
    }
    return {name: f"{value:.200}" for name, value in facts.items() if value}


def _gallery(kind: str, runs: Sequence[Run]) -> Gallery:
    columns, notes = [], []
    for run in runs:
        pictures = run.pictures.get(kind, {})
        columns.append([(seen, f"data:image/png;base64,{base64.b64encode(png).decode()}") for seen, png in pictures.items()])
        found = run.found.get(kind, 0)
        notes.append(f"{len(pictures)} of {found:,} pictures, evenly spread" if len(pictures) < found else "")
    images = sorted({images for column in columns for images, _ in column})
    return Gallery(kind.capitalize(), images, columns, notes)


def _sections(keys: Sequence[str]) -> dict[str, list[str]]:
    """Options by section; those in none come first."""
    sections: dict[str, list[str]] = {"": []}
    for key in keys:
        sections.setdefault(key.rpartition(".")[0], []).append(key)
    return {section: members for section, members in sections.items() if members}


def _faults(run: Run) -> str:
    """What a run survived, in a sentence."""
    if run.events is None:
        return "This run kept no log of events."
    counts = [(run.kinds[kind], names) for kind, names in FAULTS.items() if run.kinds[kind]]
    return ", ".join(f"{count:,} {names[count > 1]}" for count, names in counts).capitalize() or "None."
