"""The charts of a report, as SVG to be put into a page: its colours are the page's own, `var(--c1)` and so on.

Names and error codes are a stranger's, so no text of theirs is drawn: it is in the legend, which the page writes. Each
chart says in words what it shows. matplotlib is imported with the first chart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from loadtest.results.columns import Bools, Columns, Floats, arrived, first_tokens, in_flight, nearest_rank
from loadtest.results.record import TIERS, Record, Run
from loadtest.results.summary import share_text, warmth
from loadtest.results.tables import milliseconds, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 380, 210  # units of the SVG; about the pixels that a column of the page has
_SERIES = ("#010101", "#010102", "#010103", "#010104", "#010105", "#010106")  # stand for --c1 to --c6
_SOFT, _LINE = "#010107", "#010108"
_NICE_S = (0.25, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)
_MOST_WINDOWS = 60
_ENOUGH = 5  # answers in a window, for its percentiles to be drawn
_MOST_KINDS = 5
_MOST_FLOWS = 6
_MOST_JOBS = 40
_MOST_POINTS = 120  # of a distribution
_PERCENTILES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
Paint = Callable[["Axes"], None]


@dataclass(frozen=True, slots=True)
class Chart:
    """`svg` is trusted markup; `legend` and `words` are plain text. A legend's entry: (number of the colour, name)."""

    title: str
    svg: str
    words: str
    legend: tuple[tuple[int, str], ...] = ()


def charts(run: Run) -> Iterator[Chart]:
    """All charts that this run has something to show in.

    Raises: ImportError: matplotlib is not installed.
    """
    columns = Columns.of([record for record in run.records if record.kind == "generate"])
    jobs = [record for record in run.records if record.kind == "train"]
    last_s = max([record.ended_s for record in run.records], default=0.0)
    if len(columns):
        yield from _Drawing(run, columns, last_s).all()
    if jobs:
        yield _jobs(jobs, last_s)


class _Drawing:
    """The charts of requests. Those over time show the whole run, in windows of one width; all else is as counted."""

    def __init__(self, run: Run, columns: Columns, last_s: float) -> None:
        self._columns = columns
        self._answered = columns[columns.ok]
        self._begin, self._end = run.window_s
        self._counted = self._answered[self._answered.at >= self._begin]
        self._width = _window_width(last_s, len(self._answered))
        self._edges: Floats = np.arange(int(last_s / self._width) + 2, dtype=np.float64) * self._width
        self._middles = self._edges[:-1] + self._width / 2

    def all(self) -> Iterator[Chart]:
        answered = self._answered
        if len(self._counted):
            yield self._percentiles("Whole answers", answered.took, answered.at)
            first = first_tokens(answered)
            yield self._percentiles("Time to the first token", answered.ttft[first], answered.at[first])
            yield self._ttft_by_tier()
        yield self._offered()
        if len(answered):
            yield self._tokens()
        if not self._counted.tier.where("").all():
            yield self._tiers()
        if (self._columns.is_error | self._columns.outcome.where("refused")).any():
            yield self._errors()
        yield self._in_flight()
        if not np.isnan(self._counted.time_per_token).all():
            yield self._token_times()
        if len(self._columns.flow.names) > 1 and len(self._counted):
            yield self._flows()
        yield self._percentiles("Lag of the tester", self._columns.lag, self._columns.at, is_latency=False)

    def _percentiles(self, title: str, values: Floats, at: Floats, is_latency: bool = True) -> Chart:
        lines = self._by_window(values, at)
        counted = values[at >= self._begin]
        ordered = np.sort(counted if len(counted) else values) * 1000

        def paint(axes: Axes) -> None:
            for colour, row in zip(_SERIES, lines, strict=False):
                self._line(axes, row * 1000, colour)
            if is_latency:
                _log_axis(axes.yaxis)
            else:
                _milliseconds_axis(axes.yaxis)
                axes.set_ylim(bottom=0)

        known = lines[2][~np.isnan(lines[2])] * 1000
        span = (
            f"; p99 of a window from {milliseconds(known.min())} to {milliseconds(known.max())}" if len(known) else ""
        )
        words = ", ".join(f"{name} {milliseconds(nearest_rank(ordered, share))}" for name, share in _PERCENTILES)
        legend = tuple((index + 1, name) for index, (name, _) in enumerate(_PERCENTILES))
        return Chart(
            title, self._over_time(paint), f"{words}{span}. {self._windows()}, by when requests were due.", legend
        )

    def _ttft_by_tier(self) -> Chart:
        rows = self._counted[first_tokens(self._counted)]
        tiers = _tiers_of(rows) or [("", np.ones(len(rows), dtype=np.bool_))]
        found = [(name, np.sort(rows.ttft[mask]) * 1000) for name, mask in tiers if mask.any()]
        words = "; ".join(
            f"{name or 'all answers'}: p50 {milliseconds(nearest_rank(values, 0.5))}, "
            f"p99 {milliseconds(nearest_rank(values, 0.99))} of {len(values):,}"
            for name, values in found
        )
        legend = tuple((_tier_colour(name), name or "all answers") for name, _ in found)
        svg = _draw(lambda axes: _distributions(axes, [(_tier_colour(name), values) for name, values in found]))
        title = "First token, by where the weights were" if found[0][0] else "First token, distribution"
        return Chart(title, svg, f"Share of answers within a time. {words}.", legend)

    def _token_times(self) -> Chart:
        means = self._counted.time_per_token
        found = [("mean of a stream", np.sort(means[~np.isnan(means)]) * 1000)]
        if len(self._counted.gaps):
            found.append(("single gaps", np.sort(self._counted.gaps) * 1000))
        words = "; ".join(
            f"{name}: p50 {milliseconds(nearest_rank(values, 0.5))}, p99 {milliseconds(nearest_rank(values, 0.99))}, "
            f"most {milliseconds(values[-1])}"
            for name, values in found
        )
        svg = _draw(lambda axes: _distributions(axes, [(index + 1, values) for index, (_, values) in enumerate(found)]))
        legend = tuple((index + 1, name) for index, (name, _) in enumerate(found))
        return Chart("Time between tokens", svg, f"{words}.", legend)

    def _offered(self) -> Chart:
        offered = np.histogram(self._columns.at, self._edges)[0] / self._width
        done = np.histogram(self._answered.ended, self._edges)[0] / self._width

        def paint(axes: Axes) -> None:
            self._line(axes, offered, _SERIES[1])
            self._line(axes, done, _SERIES[0])
            axes.set_ylim(bottom=0)

        words = (
            f"Offered up to {number(offered.max())} a second, answered up to {number(done.max())}. {self._windows()}."
        )
        return Chart("Requests a second", self._over_time(paint), words, ((2, "offered"), (1, "answered in full")))

    def _tokens(self) -> Chart:
        rates = np.diff(arrived(self._answered, self._edges)) / self._width

        def paint(axes: Axes) -> None:
            axes.bar(self._middles, rates, self._width, color=_SERIES[0])

        measured = np.diff(arrived(self._answered, np.array([self._begin, self._end], dtype=np.float64)))[0]
        mean = measured / max(self._end - self._begin, 1e-9)
        words = f"Of answers given in full: {number(mean)} a second as measured, at most {number(rates.max())}."
        return Chart("Tokens a second", self._over_time(paint), f"{words} {self._windows()}.")

    def _tiers(self) -> Chart:
        told = self._answered[~self._answered.tier.where("")]
        tiers = _tiers_of(told)
        counts = [np.histogram(told.at[mask], self._edges)[0] for _, mask in tiers]
        total = np.maximum(np.sum(counts, axis=0), 1)
        stack = [(_tier_colour(name), count / total) for (name, _), count in zip(tiers, counts, strict=True)]

        def paint(axes: Axes) -> None:
            self._bars(axes, stack)
            _percent_axis(axes.yaxis)
            axes.set_ylim(0, 1)

        told = told[told.at >= self._begin]
        words = ", ".join(f"{share_text(mask.sum(), len(told))} {name}" for name, mask in _tiers_of(told))
        legend = tuple((_tier_colour(name), name) for name, _ in tiers)
        return Chart("Where the weights were", self._over_time(paint), f"Of all answers: {words}.", legend)

    def _errors(self) -> Chart:
        rows = self._columns[self._columns.is_error | self._columns.outcome.where("refused")]
        counts = np.bincount(rows.error.codes, minlength=len(rows.error.names))
        order = np.argsort(-counts)
        order = order[counts[order] > 0]
        groups: list[tuple[str, Bools]] = [(rows.error.names[code], rows.error.codes == code) for code in order]
        if len(groups) > _MOST_KINDS + 1:
            others = np.isin(rows.error.codes, order[_MOST_KINDS:])
            groups = [*groups[:_MOST_KINDS], (f"{len(order) - _MOST_KINDS} other kinds", others)]
        stack = [
            (index + 1, np.histogram(rows.at[mask], self._edges)[0] / self._width)
            for index, (_, mask) in enumerate(groups)
        ]
        is_counted = rows.at >= self._begin
        words = ", ".join(f"{int(mask[is_counted].sum()):,} {name}" for name, mask in groups)
        share = share_text(is_counted.sum(), max((self._columns.at >= self._begin).sum(), 1))
        legend = tuple((index + 1, name) for index, (name, _) in enumerate(groups))
        return Chart(
            "Refused and failed a second",
            self._over_time(lambda axes: self._bars(axes, stack)),
            f"{words}; {share} of all requests. {self._windows()}.",
            legend,
        )

    def _in_flight(self) -> Chart:
        moments = np.linspace(0, self._edges[-1], 241)
        waiting = in_flight(self._columns, moments)

        def paint(axes: Axes) -> None:
            axes.plot(moments, waiting, color=_SERIES[0], linewidth=1.5, drawstyle="steps-post")
            axes.set_ylim(bottom=0)

        measured = waiting[(moments >= self._begin) & (moments <= self._end)]
        mean = number(float(measured.mean())) if len(measured) else "unknown"
        words = f"Sent and not yet ended: mean {mean} as measured, at most {number(float(waiting.max()))}."
        return Chart("In flight", self._over_time(paint), words)

    def _flows(self) -> Chart:
        rows = self._answered
        names = [name for name in rows.flow.names if rows.flow.where(name).any()][:_MOST_FLOWS]
        lines = [self._by_window(rows.took[mask], rows.at[mask])[1] for mask in map(rows.flow.where, names)]

        def paint(axes: Axes) -> None:
            for colour, row in zip(_SERIES, lines, strict=False):
                self._line(axes, row * 1000, colour)
            _log_axis(axes.yaxis)

        words = "; ".join(
            f"{name}: p90 {milliseconds(nearest_rank(np.sort(self._counted.took[mask]) * 1000, 0.9))}"
            for name in names
            if (mask := self._counted.flow.where(name)).any()
        )
        legend = tuple((index + 1, name) for index, name in enumerate(names))
        return Chart("Whole answers by flow, p90", self._over_time(paint), f"{words}. {self._windows()}.", legend)

    def _by_window(self, values: Floats, at: Floats) -> list[Floats]:
        """p50, p90 and p99 of each window; NaN where too few of them say."""
        order = np.argsort(at)
        cuts = np.searchsorted(at[order], self._edges)
        parts = [np.sort(values[order[low:high]]) for low, high in zip(cuts[:-1], cuts[1:], strict=True)]
        return [
            np.array([nearest_rank(part, share) if len(part) >= _ENOUGH else np.nan for part in parts])
            for _, share in _PERCENTILES
        ]

    def _line(self, axes: Axes, values: Floats, colour: str) -> None:
        axes.plot(self._middles, values, color=colour, linewidth=1.5, marker="o", markersize=2)

    def _bars(self, axes: Axes, stack: Sequence[tuple[int, Floats]]) -> None:
        below = np.zeros(len(self._middles))
        for colour, values in stack:
            axes.bar(self._middles, values, self._width, bottom=below, color=_SERIES[colour - 1])
            below = below + values

    def _over_time(self, paint: Paint) -> str:
        def whole(axes: Axes) -> None:
            for begin, end in ((0.0, self._begin), (self._end, self._edges[-1])):
                if end > begin:  # what is not measured
                    axes.axvspan(begin, end, color=_LINE, alpha=0.5, linewidth=0)
            paint(axes)
            axes.set_xlim(0, self._edges[-1])
            _time_axis(axes.xaxis, self._edges[-1])

        return _draw(whole)

    def _windows(self) -> str:
        return f"Windows of {self._width:g} s"


def _jobs(jobs: list[Record], last_s: float) -> Chart:
    shown = sorted(jobs, key=lambda job: job.at_s)[:_MOST_JOBS]
    names = ("done", "not done")

    def paint(axes: Axes) -> None:
        for row, job in enumerate(shown):
            colour = _SERIES[0 if job.outcome == "ok" else 2]
            axes.barh(row, job.ended_s - job.at_s, left=job.at_s, height=0.7, color=colour)
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_yticks([])
        axes.set_xlim(0, max(last_s, 1e-3))
        _time_axis(axes.xaxis, last_s)

    done = [job.took_s * 1000 for job in jobs if job.outcome == "ok"]
    took = f", in {milliseconds(min(done))} to {milliseconds(max(done))}" if done else ""
    more = f" The first {len(shown)} are drawn." if len(shown) < len(jobs) else ""
    words = f"{len(done)} of {len(jobs)} done{took}.{more} A bar is a job, from its upload to its end."
    return Chart("Training jobs", _draw(paint), words, ((1, names[0]), (3, names[1])))


def _window_width(last_s: float, num_answered: int) -> float:
    """Wide enough that there are not too many windows and that the mean one has some answers; a round number."""
    wanted = max(last_s / _MOST_WINDOWS, min(last_s / 12, 4 * _ENOUGH * last_s / max(num_answered, 1)), 1e-3)
    return next((width for width in _NICE_S if width >= wanted), wanted)


def _tiers_of(columns: Columns) -> list[tuple[str, Bools]]:
    names = (name for name in columns.tier.names if name and columns.tier.where(name).any())
    return [(name, columns.tier.where(name)) for name in sorted(names, key=warmth)]


def _tier_colour(name: str) -> int:
    return TIERS.index(name) + 1 if name in TIERS else 5 if name else 1


def _distributions(axes: Axes, found: Sequence[tuple[int, Floats]]) -> None:
    for colour, values in found:
        ranks = np.unique(np.linspace(0, len(values) - 1, min(len(values), _MOST_POINTS)).astype(int))
        x = np.maximum(values[ranks], 1e-3)
        axes.plot(
            np.concatenate([x[:1], x]),
            np.concatenate([[0.0], (ranks + 1) / len(values)]),
            color=_SERIES[colour - 1],
            linewidth=1.5,
            drawstyle="steps-post",
        )
    _log_axis(axes.xaxis)
    _percent_axis(axes.yaxis)
    axes.set_ylim(0, 1.02)


def _log_axis(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0, 3.0) if decades < 3 else (1.0,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: _tick(value))


def _milliseconds_axis(axis: Any) -> None:
    axis.set_major_formatter(lambda value, _: _tick(value) if value else "0")


def _tick(value: float) -> str:
    return f"{value / 1000:g} s" if value >= 1000 else f"{value:g} ms"


def _percent_axis(axis: Any) -> None:
    axis.set_major_formatter(lambda value, _: f"{value * 100:.0f} %")


def _time_axis(axis: Any, last_s: float) -> None:
    from matplotlib.ticker import MaxNLocator, MultipleLocator

    if last_s < 180:
        axis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_major_formatter(lambda value, _: f"{value:g} s")
        return
    step = next((step for step in (30, 60, 120, 300, 600, 1200, 1800, 3600, 7200) if last_s / step <= 7), last_s / 6)
    axis.set_major_locator(MultipleLocator(step))
    axis.set_major_formatter(lambda value, _: f"{int(value) // 60}:{int(value) % 60:02d}")


def _draw(paint: Paint) -> str:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise ImportError("charts need matplotlib: pip install 'rookery[loadtest]'") from exc

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "rookery", "font.size": 10, "path.simplify": True,
        "axes.edgecolor": _LINE, "axes.labelcolor": _SOFT, "xtick.color": _SOFT, "ytick.color": _SOFT,
        "xtick.major.size": 0, "ytick.major.size": 0, "xtick.major.pad": 6, "axes.axisbelow": True,
        "axes.grid": True, "grid.color": _LINE,
        "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        figure.patch.set_visible(False)
        axes = figure.add_axes((46 / WIDTH, 24 / HEIGHT, (WIDTH - 58) / WIDTH, (HEIGHT - 32) / HEIGHT))
        axes.patch.set_visible(False)
        paint(axes)
        return _for_page(_svg(figure))


def _svg(figure: Any) -> str:
    from io import StringIO

    file = StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return file.getvalue()


def _for_page(svg: str) -> str:
    """Without the parts of a file of its own, and with the colours of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg [^>]*?>", f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">', svg, count=1)
    for index, colour in enumerate(_SERIES, start=1):
        svg = svg.replace(colour, f"var(--c{index})")
    svg = svg.replace(_SOFT, "var(--soft)").replace(_LINE, "var(--line)")
    return re.sub(r"\s*\n\s*", "\n", svg)
