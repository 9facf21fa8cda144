from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

from loadtest.results.commands import compare_files, report
from loadtest.results.compare import compare
from loadtest.results.files import write
from loadtest.results.record import STOPPED, Run
from loadtest.results.tables import milliseconds, number, print_comparison, print_table
from tests.loadtest.synthetic import header, queue_run, record


def shown(run: Run, price: float | None = None, width: int = 100) -> str:
    console = Console(file=StringIO(), width=width)
    print_table(run, console, price)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def invoke(*arguments: str) -> Result:
    app = typer.Typer()
    app.command("report")(report)
    app.command("compare")(compare_files)
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120", "NO_COLOR": "1"})


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for seed, path in enumerate(paths):
        write(path, queue_run(seed, duration_s=10.0))
    return paths


def test_the_table_says_beside_the_latencies_what_share_was_not_answered() -> None:
    refused = [record(n, outcome="refused", first_s=None, error="overloaded") for n in range(3)]
    text = shown(Run(header(), (record(0), *refused)))
    assert "3 refused (75.0 %)" in text and "1 answered" in text and "3 overloaded" in text


def test_the_table_tells_what_was_waiting_when_a_run_was_stopped() -> None:
    waiting = record(1, outcome="timeout", first_s=None, error=STOPPED, ended_s=8.0)
    text = shown(Run(header(), (record(0), waiting), stopped_s=8.0), width=160)
    assert "1 waiting when stopped (50.0 %)" in text and "0 timed out" in text and "not answered" not in text
    assert "waiting when stopped" not in shown(Run(header(), (record(0),)))


def test_p99_of_few_answers_has_a_star() -> None:
    assert "p99*" in shown(Run(header(), (record(0),)))
    assert "p99*" not in shown(queue_run(1))


def test_the_table_is_one_screen_and_its_brackets_are_no_markup() -> None:
    run = queue_run(1)
    mixed = tuple(replace(r, flow=f"[b]{r.number % 20}", error="[/x]", outcome="failed") for r in run.records[:100])
    text = shown(Run(run.header, run.records + mixed), 2.0, width=100)
    assert len(text.splitlines()) <= 40 and "[b]3" in text and "100 [/x]" in text and "and 13 more" in text


def test_a_run_without_records_has_a_table() -> None:
    assert "nothing to tell" in shown(Run(header(), ()))


def test_a_comparison_is_one_screen_with_its_warnings() -> None:
    a = queue_run(1, duration_s=10.0)
    b = replace(a, header=replace(a.header, machine="[red]other"))
    console = Console(file=StringIO(), width=100)
    print_comparison(compare(a, b, resamples=20), console)
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert "! The machines differ: 2 cores and [red]other." in text and "no difference shown" in text
    assert len(text.splitlines()) <= 45


def test_report_ends_with_a_line_of_json(files: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = invoke("report", str(files[0]), "--json", "--html", str(page), "--price-per-hour", "2")
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["requests"] > 0 and line["usd_per_1000_tweets"] > 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_compare_ends_with_a_line_of_json(files: tuple[Path, Path]) -> None:
    done = invoke("compare", *map(str, files), "--json")
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["a"] == str(files[0]) and line["figures"]["tokens_s"]["ratio"] > 0


def test_a_file_that_is_no_result_is_a_sentence_and_no_traceback(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("hello\n")
    for path, words in ((bad, "line 1"), (tmp_path / "none.jsonl", "No such file")):
        done = invoke("report", str(path))
        assert done.exit_code == 2 and words in done.output and "Traceback" not in done.output


def test_a_page_that_cannot_be_written_is_a_sentence_after_the_table(files: tuple[Path, Path]) -> None:
    done = invoke("report", str(files[0]), "--html", str(files[0].parent))
    assert done.exit_code == 2 and "Is a directory" in done.output and "first token" in done.output


def test_one_price_alone_compares_nothing(files: tuple[Path, Path]) -> None:
    done = invoke("compare", *map(str, files), "--price-a", "1")
    assert done.exit_code == 2 and "--price-b" in done.output


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0.00 ms"), (0.523, "0.52 ms"), (42.74, "42.7 ms"), (999.9, "1 s"), (1250.0, "1.25 s"),
     (125_000.0, "125 s"), (3_600_000.0, "3,600 s")],
)  # fmt: skip
def test_milliseconds_have_three_digits(value: float | None, text: str) -> None:
    assert milliseconds(value) == text


def test_numbers_have_three_digits_or_all_of_a_large_one() -> None:
    assert [number(value) for value in (None, 0.01234, 4.567, 12345.6, 7)] == ["–", "0.0123", "4.57", "12,346", "7"]
