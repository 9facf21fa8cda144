"""A run as one page: no script, nothing loaded from elsewhere, light and dark. It computes nothing."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from loadtest.results.charts import Chart, charts
from loadtest.results.record import Run
from loadtest.results.summary import ENOUGH_FOR_P99, Summary, summarize
from loadtest.results.tables import flow_cells, milliseconds, number, percent

_LATENCIES = (
    ("First token", "ttft_ms"),
    ("Whole answer", "ms"),
    ("Time a token", "itl_ms"),
    ("Gap in a stream", "gap_ms"),
    ("Lag of the tester", "lag_ms"),
)


def write_html(run: Run, path: Path, price_per_hour: float | None = None) -> None:
    """Writes the report of a run.

    Raises: ImportError: matplotlib is not installed. OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(run, price_per_hour), encoding="utf-8")


def render(run: Run, price_per_hour: float | None = None) -> str:
    """The page."""
    total = summarize(run, price_per_hour)
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"ms": _milliseconds, "number": number, "percent": _percent}
    pages.filters |= {"pretty": _pretty, "together": _together}
    return pages.get_template("report.html").render(
        run=run,
        header=run.header,
        total=total,
        price=price_per_hour,
        latencies=_latencies(total),
        flows=_flows(total),
        is_few=0 < total.answered < ENOUGH_FOR_P99,
        charts=[_placed(chart, index) for index, chart in enumerate(charts(run))],
    )


def _latencies(total: Summary) -> list[tuple[str, list[float | None]]]:
    spreads = ("mean", "p50", "p90", "p99", "max")
    return [(name, [getattr(total, f"{spread}_{key}", None) for spread in spreads]) for name, key in _LATENCIES]


def _flows(total: Summary) -> list[tuple[str, tuple[str, ...], tuple[float, float] | None]]:
    """Name, cells, and where the bar from p50 to p99 of whole answers begins and how long it is, in percent."""
    if len(total.flows) < 2:
        return []
    spans = {
        name: (math.log(max(flow.p50_ms, 1e-3)), math.log(max(flow.p99_ms, 1e-3)))
        for name, flow in total.flows.items()
        if flow.p50_ms is not None and flow.p99_ms is not None
    }
    low = min((span[0] for span in spans.values()), default=0.0)
    width = max((span[1] for span in spans.values()), default=0.0) - low or 1.0

    def bar(name: str) -> tuple[float, float] | None:
        span = spans.get(name)
        return None if span is None else (100 * (span[0] - low) / width, max(1.0, 100 * (span[1] - span[0]) / width))

    return [(name, flow_cells(flow), bar(name)) for name, flow in total.flows.items()]


def _placed(chart: Chart, index: int) -> dict[str, Any]:
    """With ids that no other chart of the page has."""
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>c{index}-", chart.svg)
    return {"title": chart.title, "svg": Markup(svg), "words": _together(chart.words), "legend": chart.legend}


def _milliseconds(value: float | None) -> str:
    return _together(milliseconds(value))


def _percent(value: float | None) -> str:
    return _together(percent(value))


def _together(text: str) -> str:
    """With spaces that do not break between a number and its unit."""
    return re.sub(r"(?<=\d) (?=(?:%|ms|s)(?!\w))", "\u00a0", text)


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
