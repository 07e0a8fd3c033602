"""The charts of a report, as plotly figures."""

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.colors import hex_to_rgb

from vae_scale.tracking.panels import CHARTS
from vae_scale.tracking.report.runs import Run

COLORS = ("#3d7dd8", "#e0692e", "#2a9d78", "#a45fd0", "#c29a1b", "#d6457e", "#5b8c2a", "#7b8794")  # for both themes
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
MAX_POINTS = 2000  # of a curve
MIN_POINTS_TO_CROP = 40
HIDDEN = ("train/epoch",)  # always a straight line
HIDDEN_IF_CONSTANT = ("train/beta", "train/skipped_steps", "data/replaced_images")
TICK_FORMATS = {"train/lr": "~g", "perf/data_loading_fraction": "~%", "perf/memory_bytes": "~s"}


class Chart(NamedTuple):
    """A figure with its heading."""

    title: str
    note: str
    figure: str  # plotly's JSON, safe to embed in a <script>


def run_color(index: int) -> str:
    """Returns the color of the run at `index`."""
    return COLORS[index % len(COLORS)]


def metric_charts(runs: Sequence[Run]) -> dict[str, list[Chart]]:
    """Returns the charts by section: those of `CHARTS` for which a run has metrics, and one per other metric."""
    sections = {section: {title: list(metrics) for title, metrics in charts.items()} for section, charts in CHARTS.items()}
    known = {metric for charts in CHARTS.values() for metrics in charts.values() for metric in metrics}
    unlisted = sorted({metric for run in runs for metric in run.curves} - known)
    sections["Other"] = {metric: [metric] for metric in unlisted}
    charts = {}
    for section, titles in sections.items():
        drawn = [_metric_chart(title, metrics, runs, section == "Performance") for title, metrics in titles.items()]
        charts[section] = [chart for chart in drawn if chart]
    return charts


def _metric_chart(title: str, metrics: Sequence[str], runs: Sequence[Run], from_zero: bool) -> Chart | None:
    curves = [
        (index, metric, np.array(run.curves[metric]))
        for index, run in enumerate(runs)
        for metric in metrics
        if metric in run.curves and metric not in HIDDEN
    ]
    if not curves:
        return None
    values = np.concatenate([curve[:, 1] for *_, curve in curves])
    if metrics[0] in HIDDEN_IF_CONSTANT and np.ptp(values) == 0:
        return None
    traces = []
    for index, metric, curve in curves:
        points = downsample(curve)
        is_faint = len(metrics) > 1 and metric.startswith("train/")
        trace = go.Scatter(
            x=points[:, 0],
            y=points[:, 1],
            mode="lines+markers" if metric.startswith("eval/") or len(points) == 1 else "lines",
            name=f"{html.escape(runs[index].name)} {metric.partition('/')[0]}",  # plotly renders names as HTML
            meta={"run": index},
            opacity=0.45 if is_faint else 1,
            line={"color": run_color(index), "width": 1.5 if is_faint else 2},
            marker={"size": 6},
            hovertemplate="%{y:.5~g}",
        )
        traces.append(trace)
    axis: dict[str, Any] = {"tickformat": TICK_FORMATS.get(metrics[0], "~s" if np.abs(values).max() >= 1e4 else "")}
    cropped = None if from_zero else _cropped_range(values, [curve[-1, 1] for *_, curve in curves])
    axis |= {"range": cropped} if cropped else {"rangemode": "tozero" if from_zero else "normal"}
    note = "outliers are outside the axis" if cropped else ""
    return Chart(title, note, _to_json(traces, height=220, yaxis=axis))


def downsample(curve: np.ndarray, max_points: int = MAX_POINTS) -> np.ndarray:
    """Reduces a curve [n, 2] to the minimum and maximum of equal intervals, which preserves spikes, and the last point."""
    if len(curve) <= max_points:
        return curve
    parts = np.array_split(np.arange(len(curve)), (max_points - 1) // 2)
    extremes = [index for part in parts for index in (part[curve[part, 1].argmin()], part[curve[part, 1].argmax()])]
    return curve[np.unique([*extremes, len(curve) - 1])]


def _cropped_range(values: np.ndarray, last: Sequence[float]) -> list[float] | None:
    """Returns an axis range without outliers, e.g. of the first steps, or None if they would not flatten the curves."""
    low, high = np.quantile(values, (0.05, 0.95))
    low, high = min(low, *last), max(high, *last)
    if len(values) < MIN_POINTS_TO_CROP or not np.ptp(values) > 3 * (high - low) > 0:
        return None
    margin = 0.15 * (high - low)
    return [low - margin, high + margin]


def channel_chart(run: Run, index: int) -> Chart | None:
    """Returns the KL per latent channel: bars of the newest evaluation above a heat map of all; None without evaluations."""
    if not run.kl_per_channel:
        return None
    images, values = zip(*run.kl_per_channel, strict=True)
    color = run_color(index)
    colorscale = [[0, f"rgba{(*hex_to_rgb(color), 0)}"], [1, color]]
    bars = go.Bar(y=values[-1], marker={"color": color}, hovertemplate="channel %{x}: %{y:.4~g} nats<extra></extra>")
    hover = "%{y:,} images, channel %{x}: %{z:.4~g} nats<extra></extra>"
    heatmap = go.Heatmap(z=values, y=images, yaxis="y2", showscale=False, colorscale=colorscale, hovertemplate=hover)
    figure = _to_json(
        [bars, heatmap],
        height=380,
        yaxis={"domain": [0.64, 1], "title": "nats"},
        yaxis2={"domain": [0, 0.54], "title": "images seen", "tickformat": "~s", "showgrid": False},
        xaxis={"anchor": "y2", "title": "latent channel", "showgrid": False},
        hovermode="closest",
    )
    return Chart(run.name, "below: over training", figure)


def _to_json(traces: Sequence[Any], **layout: Any) -> str:
    """Returns a figure with the common layout; the page sets the colors of the theme."""
    common = {
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
    }
    figure = go.Figure(list(traces), common | layout)
    figure.update_xaxes(automargin=True, zeroline=False, ticks="", nticks=6)
    figure.update_yaxes(automargin=True, zeroline=False, ticks="", nticks=6)
    return str(figure.to_json())  # escapes "<"
