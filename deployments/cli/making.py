"""The verbs that make bots: look at archives, train, make again, take in what others made."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from deployments import show
from deployments.cli.app import MAKE, Exit, command
from deployments.cli.jobs import follow_job
from deployments.cli.options import (
    DEFAULT_URL,
    Archives,
    AsJson,
    Data,
    Handles,
    Job,
    Model,
    Url,
    console,
    print_json,
    remark,
    remarks,
    settings_of,
    tell,
)
from deployments.cli.terminal import confirm, is_attended, state_folder
from deployments.client import Client, Json
from deployments.progress import TransferProgress


class _Priority(StrEnum):
    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


@command(
    MAKE,
    """
    rookery preview twitter-archive.zip --handle ada
    rookery preview ada.zip --json
    """,
)
def preview(
    archives: Archives,
    handles: Handles = None,
    as_json: AsJson = False,
) -> None:
    """Look at what a bot would learn from; no server is needed."""
    from serve.training import dataset

    _check_handles(handles, archives)
    report = dataset.preview(archives, handles)
    if as_json:
        return print_json(report)
    show.show_preview(console, report)


@command(
    MAKE,
    """
    rookery train twitter-archive.zip --handle ada
    rookery train ada.zip bob.zip --handle ada --handle bob
    rookery train ada.zip --handle ada --epochs 2 --no-wait --json
    rookery jobs wait $(rookery train ada.zip --handle ada --no-wait)
    """,
)
def train(
    archives: Archives,
    handles: Handles = None,
    base: Annotated[str | None, typer.Option(help="The base model; the server has a default.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, max=50, help="How often each post is learnt (4).")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**31 - 1, help="The same seed and archive make the same bot.")
    ] = None,
    validation: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Posts to judge by; else a tenth of the archive.")
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="The name of the model, if not as the handles say.")] = None,
    priority: Annotated[_Priority, typer.Option(help="Jobs of a higher one go first.")] = _Priority.NORMAL,
    idempotency_key: Annotated[
        str | None, typer.Option(help="A name of this request: repeated under it, it gives the same job.")
    ] = None,
    wait: Annotated[
        bool | None, typer.Option("--wait/--no-wait", help="Stay until the bot is ready; the default in a terminal.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="You have the right to use the archive; a terminal asks it once.")
    ] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Make a bot from one archive, or a cyborg from several.

    Prints the id of the job where it does not wait. Ctrl-C leaves the job to itself, a second one can cancel it.
    """
    _check_handles(handles, archives)
    if not yes and is_attended():
        _ask_for_consent()
    options = {"base_model": base, "n_epochs": epochs, "seed": seed, "suffix": suffix, "priority": priority.value}
    with Client(url) as client:
        job = _send(client, archives, handles or [], options, validation, idempotency_key)
        if wait is None:
            wait = remarks.is_terminal and console.is_terminal and not as_json
        if wait:
            return follow_job(client, job["id"], as_json=as_json)
    if as_json:
        return print_json(job)
    tell(job["id"])
    remark(f"The job is {job['status']}. Follow it with: rookery jobs wait {job['id']}")


def _ask_for_consent() -> None:
    """Once for each user of this machine. Raises: typer.Exit when they do not say yes."""
    given = state_folder() / "consent"
    if given.exists():
        return
    remark("A bot repeats what it has learnt, so learn only from what is yours, or what its author lets you use.")
    if not confirm("Do you have the right to use this archive, and those that you will send later?"):
        typer.echo("rookery: nothing was sent.", err=True)
        raise typer.Exit(Exit.REFUSED)
    given.touch()


def _send(
    client: Client,
    archives: list[Path],
    handles: list[str],
    options: Mapping[str, object],
    validation: Path | None,
    key: str | None,
) -> Json:
    """Uploads all files and shows how far it is; the job."""
    total_bytes = sum(path.stat().st_size for path in [*archives, *([validation] if validation else [])])
    with TransferProgress(remarks) as progress:
        return client.create_bot(
            archives,
            handles,
            options,
            validation=validation,
            key=key,
            on_sent=lambda num_bytes: progress.update("uploading", "", num_bytes, total_bytes),
        )


def _check_handles(handles: list[str] | None, archives: list[Path]) -> None:
    if handles and len(handles) > len(archives):
        raise typer.BadParameter(f"{len(handles)} handles for {len(archives)} archives.", param_hint="--handle")


@command(
    MAKE,
    """
    rookery runs ftjob-1234
    rookery runs ftjob-1234 --json
    """,
)
def runs(
    job_id: Job,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Tell what a job used and made: its runs, their data sets, settings, results and examples."""
    with Client(url) as client:
        listed = client.list_runs(job_id)
    if as_json:
        return print_json(listed)
    for run in listed["data"]:
        show.show_run(console, run)
    if not listed["data"]:
        remark("Nothing is recorded before a job has succeeded.")


@command(
    MAKE,
    """
    rookery reproduce huggingtweets/ada
    rookery reproduce huggingtweets/ada --archive ada.zip --strict
    """,
)
def reproduce(
    model: Model,
    archives: Annotated[
        list[Path] | None,
        typer.Option("--archive", exists=True, dir_okay=False, help="What it was made from, if that is not kept."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Keep the model that is made, in here.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse where anything is not as it was.")] = False,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Train a model again as it was trained, and compare the weights; no server is needed."""
    from deployments.reproduce import print_reproduction, reproduce_model

    done = reproduce_model(settings_of(data), model, archives or [], out=out, strict=strict)
    print_reproduction(done, console, as_json=as_json)
    if not done.equal:
        raise typer.Exit(Exit.REFUSED)


@command(
    MAKE,
    """
    rookery import ./my-gpt2 --as me/my-gpt2
    rookery import ./my-gpt2 --as me/my-gpt2 --data ~/bots
    """,
    name="import",
)
def import_(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A Hugging Face model folder.")],
    model_id: Annotated[str, typer.Option("--as", metavar="ORG/NAME", help="The id to serve it under.")],
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Make a Hugging Face folder servable; no server is needed, and a running one sees it at once."""
    from serve.store.opening import open_store

    revision = open_store(settings_of(data)).import_folder(folder, model_id)
    if as_json:
        return print_json({"id": revision.model_id, "revision": revision.revision, "path": str(revision.path)})
    tell(f"{revision.model_id} is here as revision {revision.revision}.")
