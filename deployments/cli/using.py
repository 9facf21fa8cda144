"""The verbs that look at bots and keep order among them: list, show, go back to an earlier version, delete."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from deployments import show
from deployments.cli.app import LOOK, USE, command
from deployments.cli.options import (
    DEFAULT_URL,
    AsJson,
    Limit,
    Model,
    ModelAt,
    Url,
    console,
    print_json,
    remark,
    remarks,
    tell,
)
from deployments.cli.words import complete_models, complete_revisions
from deployments.client import Client, Refused


@command(
    LOOK,
    """
    rookery ls
    rookery ls ada --json
    rookery ls old- -q | xargs rookery rm
    """,
    name="ls",
)
def list_models(
    query: Annotated[str | None, typer.Argument(help="Only models with this in their id.")] = None,
    limit: Limit = 100,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """List the models that the server has; with --quiet their ids alone."""
    with Client(url) as client:
        listed = client.list_models(limit=limit, query=query)
    if as_json:
        return print_json(listed)
    if remarks.quiet:
        return show.show_ids(console, listed["data"])
    show.show_table(console, show.models_table(listed["data"]))
    if listed["has_more"]:
        remark(f"There are more than {limit}; use --limit, or name a part of the id.")


@command(
    LOOK,
    """
    rookery ps
    rookery ps --json
    """,
)
def ps(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the models that are in memory now."""
    with Client(url) as client:
        listed = client.list_residents()
    if as_json:
        return print_json(listed)
    show.show_table(console, show.residents_table(listed["data"]))


@command(
    LOOK,
    """
    rookery show huggingtweets/ada
    rookery show huggingtweets/ada --json
    """,
    name="show",
)
def show_model(model: Model, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Tell what is known of a model."""
    with Client(url) as client:
        info = client.get_model(model)
        num_versions = sum(one["step"] is None for one in client.list_versions(model)["data"])
    if as_json:
        return print_json({**info, "num_versions": num_versions})
    console.print(show.model_facts(info, num_versions))
    if info["counts"]:
        console.print(show.counts_table(info["counts"]))


@command(
    LOOK,
    """
    rookery card huggingtweets/ada
    rookery card huggingtweets/ada --raw > README.md
    """,
)
def card(
    model: ModelAt,
    raw: Annotated[
        bool, typer.Option("--raw", help="As it is written, in a terminal too, but without control characters there.")
    ] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Print the card of a model, which the Hub shows as its page."""
    with Client(url) as client:
        text = client.read_card(model)
    if as_json:
        return print_json({"id": model, "card": text})
    if console.is_terminal and not raw:
        return show.show_card(console, text)
    shown = show.plain(text) if console.is_terminal else text
    typer.echo(shown, nl=not text.endswith("\n"), color=True)  # else it takes out what looks like a colour


@command(
    LOOK,
    """
    rookery versions huggingtweets/ada
    rookery versions huggingtweets/ada --json
    """,
)
def versions(model: Model, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the versions of a model; each one answers as MODEL@REVISION."""
    with Client(url) as client:
        listed = client.list_versions(model)
    if as_json:
        return print_json(listed)
    show.show_table(console, show.versions_table(listed["data"]))


@command(
    USE,
    """
    rookery rollback huggingtweets/ada
    rookery rollback huggingtweets/ada 1f0c2ab
    """,
)
def rollback(
    model: Model,
    revision: Annotated[
        str | None, typer.Argument(help="The one before, if none is named.", autocompletion=complete_revisions)
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Have an earlier version of a model answer under its name; nothing is deleted."""
    with Client(url) as client:
        if revision is None:
            revision = _find_earlier(client.list_versions(model)["data"], model)
        version = client.roll_back(model, revision)
    if as_json:
        return print_json(version)
    tell(f"{version['model']} is now revision {version['revision']}.")


def _find_earlier(listed: list[dict[str, Any]], model: str) -> str:
    """Of finished models, newest first, the one after the one that answers now."""
    finished = [one for one in listed if one["step"] is None]
    position = next((i for i, one in enumerate(finished) if one["is_main"]), 0)
    if position + 1 >= len(finished):
        raise Refused(f"'{model}' has no version before the one that answers now; see: rookery versions {model}")
    return str(finished[position + 1]["revision"])


@command(
    USE,
    """
    rookery rm huggingtweets/ada
    rookery rm huggingtweets/ada huggingtweets/bob
    """,
    name="rm",
)
def remove(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL", help="The models to delete.", autocompletion=complete_models)
    ],
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Delete models from the server's disk and memory."""
    with Client(url) as client:
        deleted: list[dict[str, Any]] = []
        try:
            for model in models:
                deleted.append(client.delete_model(model))
                if not as_json:
                    tell(f"{deleted[-1]['id']} is deleted.")
        finally:  # those before one that is refused are gone
            if as_json and deleted:
                print_json({"object": "list", "data": deleted})
