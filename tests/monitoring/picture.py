"""Dashboards as one picture, for eyes where there is no Grafana: each panel's queries over a run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from tests.monitoring.prometheus import Series
from tests.monitoring.queries import Panel

_COLUMNS = 4
_MOST_LINES = 12
_VARIABLE = re.compile(r"\{\{(\w+)\}\}")

Answers = Mapping[str, Sequence[Sequence[Series]]]  # by panel's name: of each of its queries


def draw(panels: Sequence[Panel], answers: Answers, path: Path) -> None:
    """All panels, in the order of the dashboards."""
    rows = math.ceil(len(panels) / _COLUMNS)
    figure = Figure(figsize=(5.5 * _COLUMNS, 3.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    started = min((one.points[0][0] for of in answers.values() for found in of for one in found), default=0.0)
    for panel, ax in zip(panels, axes, strict=False):
        ax.set_title(f"{panel.name} [{panel.unit}]", fontsize=8)
        ax.tick_params(labelsize=7)
        lines = [
            (_legend(legend, one), one)
            for legend, found in zip(panel.legends, answers[panel.name], strict=True)
            for one in found
        ]
        for label, one in lines[:_MOST_LINES]:
            ax.plot([at - started for at, _ in one.points], [value for _, value in one.points], label=label, lw=1)
        top = ax.get_ylim()[1]
        for threshold in panel.thresholds:
            if threshold <= top:
                ax.axhline(threshold, color="red", lw=0.6, ls="--")
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
        if lines:
            ax.legend(fontsize=6, loc="upper left")
        else:
            ax.text(0.5, 0.5, "no data", transform=ax.transAxes, ha="center", color="red")
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    figure.savefig(path, dpi=70)


def _legend(template: str, series: Series) -> str:
    if template == "__auto":
        return ", ".join(f"{name}={value}" for name, value in series.labels.items()) or "value"
    return _VARIABLE.sub(lambda match: series.labels.get(match[1], ""), template)
