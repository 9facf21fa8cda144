"""A run and a comparison as tables for a terminal, one screen each. It computes nothing."""

from __future__ import annotations

import math

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from loadtest.results.compare import Comparison, Row
from loadtest.results.record import Run
from loadtest.results.summary import ENOUGH_FOR_P99, Figures, Summary, share_text, summarize

NONE = "–"
_MOST_KINDS = 6
_MOST_FLOWS = 8
_COLOURS = {"A": "red", "B": "green", "": ""}


def print_table(run: Run, console: Console, price_per_hour: float | None = None) -> None:
    """The figures of a run, on one screen."""
    total = summarize(run, price_per_hour)
    header = run.header
    # Names and codes are a stranger's: as Text, so that brackets in them are no markup.
    title = Text(f"{total.plan or 'plan'} · {header.target} · {header.machine}")
    parts: list[RenderableType] = [_outcomes(total), _latencies(total), _rates(total)]
    if len(total.flows) > 1:
        parts.append(_flows(total))
    if total.kinds:
        parts.append(_kinds(total))
    parts.extend(Text(note, style="yellow") for note in total.notes)
    console.print(Panel(Group(*parts), title=title, subtitle=Text(header.started_at), title_align="left"))


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Each figure of two runs, their ratio and its interval, on one screen."""
    table = Table(box=None, pad_edge=False)
    for name in ("", "A", "B", "B / A", "95 % interval", ""):
        table.add_column(name, justify="left" if name == "" else "right", no_wrap=True)
    for row in comparison.rows:
        if row.ratio is not None:
            table.add_row(*_cells(row), style=_COLOURS[row.better])
    if (comparison.name_a, comparison.name_b) != ("A", "B"):
        console.print(Text(f"A: {comparison.name_a}\nB: {comparison.name_b}"))
    console.print(table)
    console.print(
        Text(
            f"Moving-block bootstrap, blocks of {comparison.block_s:.1f} s"
            f"{', same moments of both runs together' if comparison.is_paired else ''}. Of twenty figures that do not "
            "differ, about one is outside of its interval by chance; more of them in runs near saturation.",
            style="dim",
        )
    )
    for warning in comparison.warnings:
        console.print(Text(f"! {warning}", style="yellow"))


def milliseconds(value: float | None) -> str:
    """`0.52 ms`, `43 ms`, `1.25 s`."""
    if value is None:
        return NONE
    if value >= 999.5:
        return f"{value / 1000:.3g} s" if value < 1e6 else f"{value / 1000:,.0f} s"
    return f"{value:.2f} ms" if value < 1 else f"{value:.3g} ms"


def number(value: float | None) -> str:
    """Three digits, more of large numbers: `0.0123`, `4.56`, `12,345`."""
    if value is None:
        return NONE
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def percent(value: float | None) -> str:
    return NONE if value is None else share_text(value, 1)


def _outcomes(total: Summary) -> Text:
    if not total.requests:
        return Text("0 requests")
    parts = [(f"{total.requests:,} requests: ", ""), (f"{total.answered:,} answered", "bold")]
    for name, count, style in (
        ("refused", total.refused, "yellow"),
        ("failed", total.errors - total.timeouts, "red"),
        ("timed out", total.timeouts, "red"),
        ("left as planned", total.cancelled, ""),
        *((("waiting when stopped", total.stopped, "yellow"),) if total.stopped else ()),
    ):
        share = f" ({share_text(count, total.requests)})" if count else ""
        parts.append((f" · {count:,} {name}{share}", style if count else "dim"))
    return Text.assemble(*parts)


def _latencies(total: Summary) -> Table:
    table = Table(box=None, pad_edge=False)
    star = "*" if 0 < total.answered < ENOUGH_FOR_P99 else ""
    for name in ("of those answered", "n", "mean", "p50", "p90", f"p99{star}", "most"):
        table.add_column(name, justify="left" if name == "of those answered" else "right")
    for name, suffix in (
        ("first token", "ttft_ms"),
        ("whole answer", "ms"),
        ("time a token", "itl_ms"),
        ("gap in a stream", "gap_ms"),
        ("lag of the tester", "lag_ms"),
    ):
        values = [getattr(total, f"{spread}_{suffix}", None) for spread in ("mean", "p50", "p90", "p99", "max")]
        table.add_row(name, f"{total.answered:,}" if suffix == "ms" else "", *map(milliseconds, values))
    for name, tier in total.tiers.items():
        values = [None, tier.p50_ttft_ms, tier.p90_ttft_ms, tier.p99_ttft_ms, None]
        table.add_row(Text(f"first token, {name}"), f"{tier.answered:,}", *map(milliseconds, values), style="dim")
    return table


def _rates(total: Summary) -> Text:
    lines = [
        f"offered {number(total.offered_s)} requests/s, answered {number(total.requests_s)} · "
        f"{number(total.tokens_s)} tokens/s ({number(total.goodput_tokens_s)} in full answers) · "
        f"{number(total.tweets_s)} tweets/s, over {total.window_s:.1f} s"
    ]
    if total.hit_rate is not None:
        lines.append(f"hit rate {percent(total.hit_rate)}, waited for weights {percent(total.cold_share)}")
    if total.usd_per_1000_tweets is not None:
        lines.append(f"${total.usd_per_1000_tweets:.4g} for 1,000 tweets")
    if total.jobs:
        lines.append(
            f"{total.jobs_done} of {total.jobs} training jobs done; "
            f"mean {milliseconds(total.mean_job_ms)}, longest {milliseconds(total.max_job_ms)}"
        )
    return Text("\n".join(lines))


def _flows(total: Summary) -> Table:
    table = Table(box=None, pad_edge=False)
    names = ("flow", "requests", "refused", "failed", "p50 TTFT", "p99 TTFT", "p50", "p99", "tokens/s")
    for name in names:
        table.add_column(name, justify="left" if name == "flow" else "right")
    for flow, figures in list(total.flows.items())[:_MOST_FLOWS]:
        table.add_row(Text(flow), *flow_cells(figures))
    if len(total.flows) > _MOST_FLOWS:
        table.add_row(f"and {len(total.flows) - _MOST_FLOWS} more")
    return table


def flow_cells(figures: Figures) -> tuple[str, ...]:
    """Of one flow: requests, refused, failed, then TTFT and whole answers at p50 and p99, then tokens a second."""
    latencies = (figures.p50_ttft_ms, figures.p99_ttft_ms, figures.p50_ms, figures.p99_ms)
    return (
        f"{figures.requests:,}",
        percent(figures.refused_share),
        percent(figures.error_share),
        *map(milliseconds, latencies),
        number(figures.tokens_s),
    )


def _kinds(total: Summary) -> Text:
    shown = list(total.kinds.items())[:_MOST_KINDS]
    more = f" · and {len(total.kinds) - len(shown)} more kinds" if len(total.kinds) > len(shown) else ""
    return Text("not answered: " + " · ".join(f"{count:,} {kind[:60]}" for kind, count in shown) + more, style="red")


def _cells(row: Row) -> tuple[str, ...]:
    interval = ""
    if row.low is not None and row.high is not None:
        interval = f"{row.low:.3f} to {row.high:.3f}" if math.isfinite(row.high) else f"{row.low:.3f} or more"
    return row.name, number(row.a), number(row.b), f"{row.ratio:.3f}", interval, row.verdict
