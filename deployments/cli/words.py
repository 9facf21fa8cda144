"""What the Tab key proposes: models, revisions and jobs, asked of the server. Never an error, and never long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

import typer

_LIMIT_S = 1.0
_NUM_WORDS = 100


def complete_models(context: typer.Context, incomplete: str) -> list[str]:
    """Ids of models that begin as typed."""
    from deployments.client import Client

    def ask() -> list[str]:
        with Client(_url(context)) as client:
            return [model["id"] for model in client.list_models(limit=_NUM_WORDS, query=incomplete or None)["data"]]

    return _beginning(incomplete, ask)


def complete_revisions(context: typer.Context, incomplete: str) -> list[str]:
    """Those that the model on the line could go back to, newest first."""
    from deployments.client import Client

    def ask() -> list[str]:
        with Client(_url(context)) as client:
            listed = client.list_versions(str(context.params.get("model")))["data"]
        return [one["revision"] for one in listed if one["step"] is None and not one["is_main"]]

    return _beginning(incomplete, ask)


def complete_jobs(context: typer.Context, incomplete: str) -> list[str]:
    """Ids of jobs that begin as typed, newest first."""
    from deployments.client import Client

    def ask() -> list[str]:
        with Client(_url(context)) as client:
            return [job["id"] for job in client.list_jobs(limit=_NUM_WORDS)["data"]]

    return _beginning(incomplete, ask)


def _url(context: typer.Context) -> str:
    from deployments.running import default_url

    return str(context.params.get("url") or default_url())


def _beginning(incomplete: str, ask: Callable[[], list[str]]) -> list[str]:
    """In a thread: no time-out of HTTP's covers a whole request."""
    found: list[str] = []

    def run() -> None:
        with suppress(Exception):
            found.extend(ask())

    asking = threading.Thread(target=run, daemon=True)
    asking.start()
    asking.join(_LIMIT_S)
    return [word for word in found if word.startswith(incomplete)]
