from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from axe_playwright_python.base import AXE_SCRIPT  # type: ignore[import-untyped]
from playwright.sync_api import Browser, sync_playwright

from loadtest.results.charts import Chart, charts
from loadtest.results.html import render, write_html
from loadtest.results.record import STOPPED, Outcome, Run
from tests.loadtest.synthetic import header, queue_run, record
from tests.web.browser import find_chromium

_AXE = "axe.run(document, {resultTypes: ['violations']}).then(found => found.violations.map(item => item.id))"
_SMALLEST = "Math.min(...[...document.querySelectorAll('svg text')].map(item => item.getBoundingClientRect().height))"
HOSTILE = "<script>alert('$x_1$ {{ 7*7 }}')</script>"


def rich_run() -> Run:
    """Two flows, three tiers, a warm-up, refusals, failures, cancellations and jobs."""
    plain = queue_run(1, duration_s=20.0, gaps=True)
    outcomes: list[tuple[Outcome, str]] = [("refused", "overloaded"), ("failed", HOSTILE), ("cancelled", "")]
    records = [
        replace(item, flow=("quiet", HOSTILE)[item.number % 2], tier=("device", "disk", "<i>")[item.number % 3])
        for item in plain.records
    ]
    for number, (outcome, error) in enumerate(outcomes * 3):
        records.append(record(number, at_s=10.0 + number / 10, ended_s=11.0, outcome=outcome, error=error, tier=""))
    records.append(record(99, at_s=3.0, ended_s=15.0, kind="train"))
    records.append(record(99, at_s=4.0, ended_s=15.0, kind="train", outcome="failed"))
    plan = {"name": HOSTILE, "seed": 1, "about": HOSTILE, "flows": [{"name": HOSTILE}]}
    return Run(header(plan=plan, warmup_s=2.0, duration_s=18.0, machine=HOSTILE, facts={"a": HOSTILE}), tuple(records))


class Tags(HTMLParser):
    """All tags of a page, its ids, and whether each that was opened is closed."""

    VOID = {"meta", "path", "use", "rect", "br", "input"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.ids.extend(value or "" for name, value in attrs if name == "id")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.ids.extend(value or "" for name, value in attrs if name == "id")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def drawn() -> dict[str, Chart]:
    return {chart.title: chart for chart in charts(rich_run())}


@pytest.fixture(scope="module")
def page(drawn: dict[str, Chart]) -> str:
    """The page of `rich_run`, with the charts that are drawn already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loadtest.results.html.charts", lambda run: drawn.values())
        return render(rich_run(), price_per_hour=2.5)


def test_each_part_of_a_run_has_its_chart(drawn: dict[str, Chart]) -> None:
    assert set(drawn) == {
        "Whole answers", "Time to the first token", "First token, by where the weights were", "Requests a second",
        "Tokens a second", "Where the weights were", "Refused and failed a second", "In flight", "Time between tokens",
        "Whole answers by flow, p90", "Lag of the tester", "Training jobs",
    }  # fmt: skip


def test_each_chart_says_in_words_what_it_shows(drawn: dict[str, Chart]) -> None:
    assert all(re.search(r"\d", chart.words) for chart in drawn.values())
    assert drawn["Training jobs"].words.startswith("1 of 2 done, in 12 s to 12 s.")
    assert "3 overloaded" in drawn["Refused and failed a second"].words


def test_no_text_of_a_stranger_is_drawn(drawn: dict[str, Chart]) -> None:
    assert all("alert" not in chart.svg and "<i>" not in chart.svg for chart in drawn.values())


def test_colours_of_charts_are_those_of_the_page(drawn: dict[str, Chart]) -> None:
    for chart in drawn.values():
        assert "var(--c" in chart.svg and not re.search(r"#0101\d\d", chart.svg)


def test_names_and_codes_of_strangers_are_escaped(page: str) -> None:
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "{{ 7*7 }}" in page  # shown, not evaluated
    assert "script" not in Tags(page).names


def test_the_page_is_whole_and_its_ids_are_its_own(page: str) -> None:
    tags = Tags(page)
    assert tags.open == [] and len(tags.ids) == len(set(tags.ids))
    assert tags.names.count("svg") == 12 == tags.names.count("figcaption")


def test_the_page_tells_what_was_waiting_when_a_run_was_stopped() -> None:
    waiting = record(1, outcome="timeout", first_s=None, error=STOPPED, ended_s=8.0)
    shown = render(Run(header(), (record(0), waiting), stopped_s=8.0))
    assert "The run was stopped after 8.0" in shown and "the oldest after 7.0" in shown
    assert "<dt>Waiting when stopped</dt><dd>1</dd>" in shown
    assert "Refused and failed a second" not in shown


def test_the_page_asks_for_nothing(page: str) -> None:
    assert not re.search(r"<(script|img|link|iframe|object)\b|@import|\bsrc=|url\((?!#)", page)
    assert "default-src 'none'" in page


def test_the_page_names_the_cost_and_the_shares_beside_the_latencies(page: str) -> None:
    assert "1,000 tweets" in page and "$2.50 an hour" in page
    assert re.search(r"requests answered in full; [\d.]+\u00a0% were refused and [\d.]+\u00a0% failed", page)


@pytest.mark.parametrize(
    "run",
    [
        Run(header(), ()),
        Run(header(warmup_s=5.0), (record(0),)),
        Run(header(), (record(0),)),
        Run(header(), tuple(record(n, outcome="refused", first_s=None, tier="") for n in range(20))),
        Run(header(), (record(0, kind="train", outcome="failed"),)),
        Run(header(plan={}, duration_s=0.0), (record(0, ended_s=0.0, sent_s=0.0, first_s=0.0),)),
        Run(header(), (record(0, is_streaming=False, first_s=None, tier=""), record(1, at_s=7200.0))),
    ],
    ids=["nothing", "warm-up alone", "one", "all refused", "a job alone", "no time", "hours"],
)
def test_a_run_with_little_in_it_has_a_page(run: Run) -> None:
    assert Tags(render(run, 1.0)).open == []


def test_a_page_is_small_and_written_where_it_is_wanted(page: str, tmp_path: Path) -> None:
    path = tmp_path / "reports" / "run.html"
    write_html(Run(header(), (record(0),)), path)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert 20_000 < len(page) < 1_000_000


def test_matplotlib_is_imported_by_the_first_chart_alone() -> None:
    code = "import sys; import loadtest.results.html, loadtest.results.commands; print('matplotlib' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_without_matplotlib_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'rookery\[loadtest\]'"):
        render(rich_run())


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if (path := find_chromium()) is None:
        pytest.skip("no Chromium here; apt-get install chromium, or set CHROMIUM")
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390, 320])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_at_any_width_without_asking_for_more(
    chromium: Browser, page: str, tmp_path: Path, width: int, scheme: str
) -> None:
    path = tmp_path / "run.html"
    path.write_text(page, encoding="utf-8")
    context = chromium.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if scheme == "dark" else "light"
    )
    tab = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.goto(path.as_uri())
    assert asked == [path.as_uri()] and said == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(_SMALLEST) >= 8  # pixels: the labels of the axes can be read
    tab.evaluate(AXE_SCRIPT)
    assert tab.evaluate(_AXE) == []
    context.close()
