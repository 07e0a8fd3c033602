"""The charts of a report, as plotly figures."""

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from vae_scale.tracking.panels import CHARTS
from vae_scale.tracking.report.runs import Run, evenly_spaced

COLORS = ("#3d7dd8", "#e0692e", "#2a9d78", "#a45fd0", "#c29a1b", "#d6457e", "#5b8c2a", "#7b8794")
MAX_POINTS = 2000  # of a curve


def run_color(index: int) -> str:
    """Returns the color of the run at `index`."""
    return COLORS[index % len(COLORS)]


def metric_charts(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """Returns plotly's JSON, safe to embed in a <script>, by section and title.

    The charts are those of `CHARTS` for which a run has metrics, and one for each other metric.
    """
    known = {metric for titles in CHARTS.values() for metrics in titles.values() for metric in metrics}
    others = sorted({metric for run in runs for metric in (*run.curves, *run.lists)} - known)
    figures: dict[str, dict[str, str]] = {}
    sections = CHARTS | {"Other": {metric: (metric,) for metric in others}}
    for section, titles in sections.items():
        for title, metrics in titles.items():
            traces = [trace for index, run in enumerate(runs) for metric in metrics for trace in _traces(run, index, metric)]
            if traces:
                figures.setdefault(section, {})[title] = _to_json(traces)
    return figures


def _traces(run: Run, index: int, metric: str) -> list[Any]:
    """Returns the curve of a scalar metric, or bars of the newest value of a list; nothing if the run does not have it."""
    # Plotly renders names as HTML.
    common = {"name": f"{html.escape(run.name)} {metric.partition('/')[0]}", "meta": {"run": index}}
    color = run_color(index)
    if metric in run.lists:
        return [go.Bar(y=run.lists[metric], marker={"color": color}, **common)]
    if metric not in run.curves:
        return []
    images_seen, values = zip(*evenly_spaced(run.curves[metric], MAX_POINTS), strict=True)
    is_held_out = metric.startswith("eval/")
    mode = "lines+markers" if is_held_out or len(values) == 1 else "lines"
    line = {"color": color, "width": 2 if is_held_out else 1}
    return [go.Scatter(x=images_seen, y=values, mode=mode, line=line, hovertemplate="%{y:.5~g}", **common)]


def _to_json(traces: Sequence[Any]) -> str:
    layout = {
        "template": "none",
        "height": 220,
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "showlegend": False,
        "hovermode": "x unified",
        "hoverlabel": {"namelength": 60},
        "xaxis": {"automargin": True, "zeroline": False, "nticks": 6},
        "yaxis": {"automargin": True, "zeroline": False, "nticks": 6},
    }
    return str(go.Figure(list(traces), layout).to_json())  # escapes "<"
