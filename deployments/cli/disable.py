"""`rookery disable` and `rookery enable`: a model out of use, at once and everywhere, and into it again."""

from __future__ import annotations

from typing import Annotated

import typer

from deployments.cli.app import SERVICE, command
from deployments.cli.options import DEFAULT_URL, AsJson, Model, Url, print_json, tell
from deployments.client import Client


@command(
    SERVICE,
    """
    rookery disable huggingtweets/ada
    rookery disable huggingtweets/ada --reason "complaint of 22 November"
    """,
)
def disable(
    model: Model,
    reason: Annotated[str, typer.Option(help="Kept with it; callers are not told.")] = "",
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Take a model out of use within a second, running texts included. Takes an admin's key."""
    _set(url, model, True, reason, as_json)


@command(
    SERVICE,
    """
    rookery enable huggingtweets/ada
    rookery enable huggingtweets/ada --json
    """,
)
def enable(model: Model, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Take a model that was disabled into use again. Takes an admin's key."""
    _set(url, model, False, "", as_json)


def _set(url: str, model: str, is_disabled: bool, reason: str, as_json: bool) -> None:
    with Client(url) as client:
        said = client.set_disabled(model, is_disabled, reason)
    if as_json:
        return print_json(said)
    tell(f"{said['id']} is {'disabled' if is_disabled else 'in use again'}.")
