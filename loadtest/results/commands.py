"""What `python -m loadtest report` and `compare` do: read result files, and print, write or dump what is in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from loadtest.results.compare import compare
from loadtest.results.files import BadResult, read
from loadtest.results.html import write_html
from loadtest.results.record import Run
from loadtest.results.summary import summarize
from loadtest.results.tables import print_comparison, print_table

Price = Annotated[float | None, typer.Option(min=1e-9, help="Dollars an hour of what served it: gives its cost.")]
AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]


def report(
    file: Annotated[Path, typer.Argument(help="A result: the JSONL file of a run.")],
    html: Annotated[Path | None, typer.Option(help="Also write a page with charts here.")] = None,
    price_per_hour: Price = None,
    as_json: AsJson = False,
) -> None:
    """What a run was like: a table, and with --html a page with charts."""
    run = _read(file)
    console = Console()
    print_table(run, console, price_per_hour)
    if html is not None:
        _write(run, html, price_per_hour)
        console.print(Text(f"Charts: {html}"))
    if as_json:
        _dump(summarize(run, price_per_hour).to_json())


def compare_files(
    a: Annotated[Path, typer.Argument(help="The result to compare against.")],
    b: Annotated[Path, typer.Argument(help="The result to compare.")],
    price_a: Price = None,
    price_b: Price = None,
    as_json: AsJson = False,
) -> None:
    """Ratios B / A of all figures, with 95 % confidence intervals."""
    if (price_a is None) != (price_b is None):
        raise typer.BadParameter("give --price-a and --price-b, or neither")
    prices = None if price_a is None or price_b is None else (price_a, price_b)
    result = compare(_read(a), _read(b), prices=prices, names=(str(a), str(b)))
    print_comparison(result, Console())
    if as_json:
        _dump(result.to_json())


def _read(path: Path) -> Run:
    try:
        return read(path)
    except BadResult as exc:
        raise typer.BadParameter(str(exc)) from exc
    except OSError as exc:
        raise typer.BadParameter(f"{path}: {exc.strerror or exc}") from exc


def _write(run: Run, path: Path, price_per_hour: float | None) -> None:
    try:
        write_html(run, path, price_per_hour)
    except ImportError as exc:
        raise typer.BadParameter(f"--html: {exc}") from exc
    except OSError as exc:
        raise typer.BadParameter(f"--html {path}: {exc.strerror or exc}") from exc


def _dump(line: dict[str, Any]) -> None:
    typer.echo(json.dumps(line, allow_nan=False))
