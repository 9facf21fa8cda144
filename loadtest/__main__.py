"""Load tests: `python -m loadtest --help`. What a command does is in its package; here they are wired."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

# Name -> module, function, and what `--help` says of it: numpy, torch or Ray are imported by whoever asks for them.
_ELSEWHERE = {
    "report": ("loadtest.results.commands", "report", "Tell of a result: a table, and with --html a page of charts."),
    "compare": ("loadtest.results.commands", "compare_files", "Ratios of two results, with confidence intervals."),
    "plan-capacity": ("loadtest.capacity.command", "plan_capacity", "How much hardware does my traffic need?"),
    "peers": ("loadtest.peers.command", "peers", "The same requests to Rookery and to what else could serve them."),
}


class _Elsewhere(TyperCommand):
    """A command whose module is imported when it is called, not when it is listed."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        module, function, about = _ELSEWHERE[self.name or ""]
        one = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        one.command(self.name, help=about)(getattr(import_module(module), function))
        return typer.main.get_command(one).make_context(info_name, args, parent, **extra)


class _Group(TyperGroup):
    """With the commands of `_ELSEWHERE`, which are not imported before they are called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, (_, _, about) in _ELSEWHERE.items():
            self.add_command(_Elsewhere(name, callback=None, help=about))


app = typer.Typer(
    cls=_Group,
    help="Asks a server what a plan says, and tells how it did.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Price = Annotated[float | None, typer.Option("--price-per-hour", help="Dollars an hour of what serves; gives costs.")]


@app.command()
def run(
    plan: Annotated[str, typer.Argument(help="The name of a plan (see `plans`), or a TOML file.")],
    url: Annotated[str, typer.Option(help="The server, such as http://127.0.0.1:8000.")],
    as_json: Annotated[bool, typer.Option("--json", help="End with one line of JSON instead of a table.")] = False,
    out: Annotated[Path | None, typer.Option(help="Keep every request, as JSONL.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report with charts.")] = None,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Requests a second of all flows together.")] = None,
    duration: Annotated[float | None, typer.Option(min=0.1, help="Seconds that are measured.")] = None,
    warmup: Annotated[float | None, typer.Option(min=0.0, help="Seconds before, that are not.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Another one gives other requests of the same kind.")] = None,
    models: Annotated[str, typer.Option(help='Which models: "a,b", or all that begin so: "bench/*".')] = "",
    key: Annotated[str, typer.Option(help="The API key.", envvar="ROOKERY_API_KEY")] = "",
    slo: Annotated[
        list[str] | None,
        typer.Option(help="Find the highest rate that holds p99_ttft=500ms, p99=2s, p99_itl=80ms, errors=1% …"),
    ] = None,
    probe_s: Annotated[
        float, typer.Option(min=0.01, help="Seconds of each trial of --slo, at least: 20 times the longest limit.")
    ] = 10.0,
    price: Price = None,
) -> None:
    """Play a plan: every request is sent when it is due, whatever became of those before."""
    from loadtest.client import command

    options = command.Options(
        plan=plan,
        url=url,
        key=key,
        models=tuple(model.strip() for model in models.split(",") if model.strip()),
        rate=rate,
        duration_s=duration,
        warmup_s=warmup,
        seed=seed,
        slo=tuple(slo or ()),
        probe_s=probe_s,
        price_per_hour=price,
        out=out,
        html=html,
        is_json=as_json,
    )
    raise typer.Exit(command.run(options))


@app.command()
def plans() -> None:
    """List the plans that come with the package."""
    from loadtest.traffic.reading import plan_names, read_plan

    for name in plan_names():
        typer.echo(f"{name}\n    {' '.join(read_plan(name).about.split())}")


@app.command()
def models(
    folder: Annotated[Path, typer.Argument(help="A data folder for `rookery up --data`; made if it is not there.")],
    count: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many models.")],
    shape: Annotated[str, typer.Option(help="small: GPT-2's 124M parameters; tiny: two layers.")] = "small",
    distinct: Annotated[int, typer.Option(min=1, max=1000, help="How many have weights of their own.")] = 1,
) -> None:
    """Make random GPT-2s that take the disk of one: the others are hard links."""
    from loadtest.models import SHAPES, write_linked_models

    if shape not in SHAPES:
        raise typer.BadParameter(f"'{shape}' is none of {', '.join(SHAPES)}.", param_hint="--shape")
    made = write_linked_models(folder, count, shape=SHAPES[shape], num_distinct=distinct)
    typer.echo(f"{len(made)} models in {folder}: {made[0]} to {made[-1]}")


def main() -> None:
    """The command line."""
    app(prog_name="python -m loadtest")


if __name__ == "__main__":
    main()
