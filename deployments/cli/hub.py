"""The verbs of the Hugging Face Hub: fetch a model from it, put one there."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from deployments.cli.app import HUB, Exit, command
from deployments.cli.options import DEFAULT_URL, AsJson, ModelAt, Url, print_json, remark, remarks, tell
from deployments.client import Client


@command(
    HUB,
    """
    rookery pull huggingtweets/elonmusk
    rookery pull huggingtweets/elonmusk --json
    """,
)
def pull(
    model: ModelAt,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Have the server fetch a model from the Hub, or its newest revision, and keep it."""
    from deployments.push import pull_model

    with Client(url) as client:
        try:
            info = pull_model(client, model, remarks)
        except KeyboardInterrupt:
            remark(f"\nThe server goes on with it. See it with: rookery pull {model}")
            raise typer.Exit(Exit.INTERRUPTED) from None
    if as_json:
        return print_json(info)
    tell(f"{info['id']} is here as revision {info['revision']}.")


@command(
    HUB,
    """
    rookery push huggingtweets/ada
    rookery push huggingtweets/ada --to my-org/ada --private
    """,
)
def push(
    model: ModelAt,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME",
            help="Its id there. Default: its own, or that NAME under your account where you may not write to it. "
            "Has to be given to replace what was not pushed from a Rookery.",
        ),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Who sees a new repository. Default: a private model stays private, others as your account says.",
        ),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(envvar="HF_ENDPOINT", metavar="URL", help="Another Hub than the public one.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Put a model on the Hugging Face Hub, with its card and picture, tagged with its revision.

    As you: by HF_TOKEN, or after `hf auth login`. What is pushed is what the Hub's `main` then is. Push again after an
    interruption: what has arrived is not sent again, and nothing changes where all of it is there. A card that was
    edited on the Hub stays until another revision is pushed.
    """
    from deployments.push import push_model

    with Client(url) as client:
        try:
            pushed = push_model(client, model, remarks, to=to, private=private, endpoint=endpoint)
        except KeyboardInterrupt:
            remark("\nPush again: it goes on where it was.")
            raise typer.Exit(Exit.INTERRUPTED) from None
    if as_json:
        return print_json(asdict(pushed))
    what = "was already at" if pushed.skipped else "is now at"
    tell(f"{model} {what} {pushed.url} as {pushed.tag}.")
