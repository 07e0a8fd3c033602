"""Charts of runs, as plotly figures."""

import html
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from vae_scale.reporting.curve import Curve, Point
from vae_scale.reporting.runs import Run

COLOURS = ("#3d7dd8", "#e0692e", "#2a9d78", "#a45fd0", "#c29a1b", "#d6457e", "#5b8c2a", "#7b8794")  # on white and on black
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
MANY = 40  # points, from which on an axis leaves out their extremes

# What is drawn, by the metric's name after the slash: where, title and unit. Training and held-out share a chart.
METRICS = {
    "loss": ("Learning", "Loss", ""),
    "bits_per_dim": ("Learning", "Bits per dimension", "bits/dim"),
    "velocity_error": ("Learning", "Velocity error of the flow", ""),
    "psnr_db": ("Learning", "PSNR of reconstructions", "dB"),
    "nats": ("Learning", "Negative ELBO", "nats per image"),
    "reconstruction_nats": ("Learning", "Reconstruction term", "nats per image"),
    "kl_nats": ("Learning", "KL term", "nats per image"),
    "critic_loss": ("Learning", "Critic's loss", ""),
    "grad_norm": ("Optimisation", "Gradient norm", "before clipping"),
    "lr": ("Optimisation", "Learning rate", ""),
    "beta": ("Optimisation", "Beta", "weight of the KL term"),
    "left_out": ("Optimisation", "Steps left out", "since the last point"),
    "images_per_second": ("Machine", "Speed", "images/s"),
    "wait_share": ("Machine", "Waiting for data", "share of the time"),
    "memory_bytes": ("Machine", "Memory", "bytes"),
    "missing_images": ("Machine", "Missing images", ""),
}
QUIET = ("beta", "left_out", "missing_images")  # drawn where they move
GROUPS = ("Learning", "Optimisation", "Machine", "Other")


@dataclass(frozen=True)
class Chart:
    """A chart and what is written over it.

    Attributes:
        group: Heading that it stands under.
        title: What is drawn.
        unit: Of it.
        note: What else to know.
        figure: For plotly, as JSON that is safe within a `<script>`.
    """

    group: str
    title: str
    unit: str
    note: str
    figure: str


def colour(number: int) -> str:
    """Of the run of this number."""
    return COLOURS[number % len(COLOURS)]


def curve_charts(runs: Sequence[Run]) -> list[Chart]:
    """One chart for each metric that a run has, training and held-out together, in order of their groups."""
    names = {key.rpartition("/")[2] for run in runs for key in run.curves} - {"epoch"}
    known = [name for name in METRICS if name in names]
    charts = [_curves(name, runs) for name in known + sorted(names - set(known))]
    return sorted((chart for chart in charts if chart), key=lambda chart: GROUPS.index(chart.group))


def _curves(name: str, runs: Sequence[Run]) -> Chart | None:
    group, title, unit = METRICS.get(name, ("Other", name.replace("_", " ").capitalize(), ""))
    drawn = [(number, key, curve) for number, run in enumerate(runs) for key, curve in run.curves.items()]
    drawn = [(number, key, curve) for number, key, curve in drawn if key.rpartition("/")[2] == name]
    if name in QUIET and len({value for *_, curve in drawn for _, value in curve.points}) < 2:
        return None
    both = len({key.startswith("eval/") for _, key, _ in drawn}) == 2
    traces = [_line(runs, number, key, curve.points, faint=both and key.startswith("train/")) for number, key, curve in drawn]
    shown, cut = _window([curve for *_, curve in drawn])
    cut = cut and group != "Machine"  # where a share of nothing is to look like it
    plain = "~s" if max(map(abs, shown)) >= 1e4 else ""
    style = {"lr": "~g", "wait_share": "~%", "memory_bytes": "~s"}.get(name, plain)
    axis = {"tickformat": style, "rangemode": "tozero"} if group == "Machine" else {"tickformat": style}
    figure = go.Figure(traces, _layout(height=220, yaxis=axis | ({"range": shown} if cut else {})))
    return Chart(group, title, unit, "extremes lie beyond the axis" if cut else "", _json(figure))


def _line(runs: Sequence[Run], number: int, key: str, points: list[Point], faint: bool) -> go.Scatter:
    dots = key.startswith("eval/") or len(points) == 1
    part = {"train": " training", "eval": " held-out"}.get(key.partition("/")[0], "")
    return go.Scatter(
        x=[images for images, _ in points],
        y=[value for _, value in points],
        mode="lines+markers" if dots else "lines",
        name=html.escape(runs[number].name) + part,  # plotly takes names for markup
        meta={"run": number},
        opacity=0.45 if faint else 1,
        line={"color": colour(number), "width": 1.5 if faint else 2},
        marker={"size": 6},
        hovertemplate="%{y:.5~g}",
    )


def _window(curves: Sequence[Curve]) -> tuple[list[float], bool]:
    """The range of values, and whether it leaves out a few extremes, mostly of the first steps, that would stretch it."""
    values = [value for curve in curves for _, value in curve.points]
    every = [min(values), max(values)]
    if len(values) < MANY:
        return every, False
    low, *_, high = statistics.quantiles(values, n=20)
    low, high = (end(limit, *(curve.last for curve in curves)) for end, limit in ((min, low), (max, high)))
    spare = 0.15 * (high - low)
    stretched = every[1] - every[0] > 3 * (high - low) > 0
    return ([low - spare, high + spare], True) if stretched else (every, False)


def channel_chart(run: Run, number: int) -> Chart | None:
    """Nats of KL per latent channel: bars at the newest evaluation, and how they came, as a heat map."""
    if not run.channels:
        return None
    rows = [[value if math.isfinite(value) else None for value in values] for _, values in run.channels]
    length = max(map(len, rows))
    rows = [row + [None] * (length - len(row)) for row in rows]
    bars = go.Bar(y=rows[-1], marker={"color": colour(number)}, hovertemplate="channel %{x}: %{y:.4~g} nats<extra></extra>")
    if len(rows) == 1:
        layout = _layout(height=240, yaxis={"title": "nats"}, xaxis={"title": "latent channel"})
        return Chart("", run.name, "nats per image", "", _json(go.Figure(bars, layout)))
    heat = go.Heatmap(
        z=rows,
        y=[images for images, _ in run.channels],
        yaxis="y2",
        showscale=False,
        colorscale=[[0, _faded(colour(number), 0)], [1, colour(number)]],  # on the page's own ground, light or dark
        hovertemplate="%{y:,} images, channel %{x}: %{z:.4~g} nats<extra></extra>",
    )
    layout = _layout(
        height=380,
        yaxis={"domain": [0.64, 1], "title": "nats"},
        yaxis2={"domain": [0, 0.54], "title": "images seen", "tickformat": "~s", "showgrid": False, "zeroline": False},
        xaxis={"anchor": "y2", "title": "latent channel", "showgrid": False},
        hovermode="closest",
    )
    return Chart("", run.name, "nats per image", "below: over training", _json(go.Figure([bars, heat], layout)))


def _faded(colour: str, opacity: float) -> str:
    return f"rgba({', '.join(str(int(colour[place : place + 2], 16)) for place in (1, 3, 5))}, {opacity})"


def _layout(**more: Any) -> dict[str, Any]:
    """What all charts have in common; the page adds the colours of its theme."""
    axis = {"automargin": True, "zeroline": False, "ticks": "", "nticks": 6}
    layout: dict[str, Any] = {
        "template": "none",
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "font": {"family": FONT, "size": 12},
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "showlegend": False,
        "hovermode": "x unified",
        "hoverlabel": {"namelength": 60},
        "xaxis": {"tickformat": "~s", "rangemode": "tozero"},
        "bargap": 0.15,
    } | more
    return layout | {name: axis | value for name, value in layout.items() if name.startswith(("xaxis", "yaxis"))}


def _json(figure: go.Figure) -> str:
    # The engine of the standard library, as the faster one refuses what is no Unicode.
    return str(figure.to_json(engine="json")).replace("<", r"\u003c")
