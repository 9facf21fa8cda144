"""The command `rookery`: starts the service, talks to a running one, and looks at archives without any.

Exit codes: 0 done; 1 refused, or a job that did not end as it should; 2 wrong usage; 3 no server; 130 interrupted.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import webbrowser
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from deployments import show
from deployments.client import Client, Refused, ServerUnreachable
from serve.errors import RookeryError
from serve.settings import BadSetting, Settings
from serve.types import MAX_CHOICES, PREVIEW_PROMPT, JobStatus

app = typer.Typer(
    name="rookery",
    help="Hosts thousands of personal tweet models, and makes new ones in minutes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Where no terminal tells a width, lines are not folded: programs read them.
console = Console(width=None if sys.stdout.isatty() else 240, highlight=False)

_Url = Annotated[str, typer.Option("--url", envvar="ROOKERY_URL", help="The server to talk to.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
_Limit = Annotated[int, typer.Option("--limit", min=1, max=1000, help="How many to list.")]
_Data = Annotated[Path | None, typer.Option("--data", help="Where models, uploads and jobs are kept.")]
_Archive = typer.Argument(exists=True, dir_okay=False, help="X archives (zip), or exports of posts in other formats.")
_Archives = Annotated[list[Path], _Archive]
_Handles = Annotated[list[str] | None, typer.Option("--handle", help="Whose archive it is; once for each, in order.")]
_Model = Annotated[str, typer.Argument(metavar="MODEL", help="For example huggingtweets/ada.")]

_DEFAULT_URL = Settings().url
_NUM_JOBS = 20
_EXIT_REFUSED, _EXIT_NO_SERVER, _EXIT_INTERRUPTED = 1, 3, 130


class _Priority(StrEnum):
    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


# --- The service ------------------------------------------------------------------------------------------


@app.command()
def up(
    port: Annotated[int, typer.Option(min=1, max=65_535, help="The port of the HTTP API and the page.")] = 8000,
    data: _Data = None,
    base: Annotated[str | None, typer.Option(help="The base model of new bots.")] = None,
    generators: Annotated[int, typer.Option(min=1, help="Replicas that write text; each holds its own models.")] = 1,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Do not open the page in a browser.")] = False,
) -> None:
    """Start the service and stay with it; Ctrl-C ends it."""
    settings = _settings(data)
    if base is not None:
        settings = replace(settings, base=base)
    from deployments.up import main as serve_until_stopped

    if sys.stdout.isatty() and not no_browser:
        threading.Thread(target=_open_page, args=[f"http://127.0.0.1:{port}"], daemon=True).start()
    serve_until_stopped(port, settings, num_generators=generators)


def _open_page(url: str) -> None:
    with Client(url) as client:
        while not client.is_ready():
            time.sleep(0.5)
    webbrowser.open(url)


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A Hugging Face model folder.")],
    model_id: Annotated[str, typer.Option("--as", metavar="ORG/NAME", help="The id to serve it under.")],
    data: _Data = None,
    as_json: _AsJson = False,
) -> None:
    """Make a Hugging Face folder servable; no server is needed, and a running one sees it at once."""
    from serve.store.opening import open_store

    revision = open_store(_settings(data)).import_folder(folder, model_id)
    if as_json:
        return _print_json({"id": revision.model_id, "revision": revision.revision, "path": str(revision.path)})
    console.print(f"{revision.model_id} is here as revision {revision.revision}.", markup=False, soft_wrap=True)


# --- Making bots ------------------------------------------------------------------------------------------


@app.command()
def preview(
    archives: _Archives,
    handles: _Handles = None,
    as_json: _AsJson = False,
) -> None:
    """Look at what a bot would learn from; no server is needed."""
    from serve.training import dataset

    _check_handles(handles, archives)
    report = dataset.preview(archives, handles)
    if as_json:
        return _print_json(report)
    show.show_preview(console, report)


@app.command()
def train(
    archives: _Archives,
    handles: _Handles = None,
    base: Annotated[str | None, typer.Option(help="The base model; the server has a default.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, max=50, help="How often each post is learnt (4).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed and archive make the same bot.")] = None,
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
    url: _Url = _DEFAULT_URL,
    as_json: _AsJson = False,
) -> None:
    """Make a bot from one archive, or a cyborg from several."""
    _check_handles(handles, archives)
    options = {"base_model": base, "n_epochs": epochs, "seed": seed, "suffix": suffix, "priority": priority.value}
    with Client(url) as client:
        job = client.create_bot(archives, handles or [], options, validation=validation, key=idempotency_key)
        if wait is None:
            wait = console.is_terminal and not as_json
        if wait:
            return _follow(client, job["id"], as_json)
    if as_json:
        return _print_json(job)
    console.print(
        f"{job['id']} is {job['status']}. Follow it with: rookery jobs {job['id']} --wait", markup=False, soft_wrap=True
    )


def _check_handles(handles: list[str] | None, archives: list[Path]) -> None:
    if handles and len(handles) > len(archives):
        raise typer.BadParameter(f"{len(handles)} handles for {len(archives)} archives.", param_hint="--handle")


@app.command()
def jobs(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ACTION] JOB", help="A job; before it perhaps pause, resume, cancel or events."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until the job has ended or paused.")] = False,
    limit: _Limit = _NUM_JOBS,
    url: _Url = _DEFAULT_URL,
    as_json: _AsJson = False,
) -> None:
    """List training jobs; look at one, wait for it, pause, resume or cancel it, or read its history."""
    action, job_id = _job_words(words or [])
    with Client(url) as client:
        if job_id is None:
            if wait or action:
                raise typer.BadParameter("name the job.", param_hint="JOB")
            listed = client.list_jobs(limit=limit)
            return _print_json(listed) if as_json else console.print(show.jobs_table(listed["data"]))
        if action == "events":
            listed = client.list_events(job_id, limit=limit)
            return _print_json(listed) if as_json else console.print(show.events_table(listed["data"][::-1]))
        if action:
            client.change_job(job_id, action)
        if wait:
            wanted = {"pause": JobStatus.PAUSED, "cancel": JobStatus.CANCELLED}
            return _follow(client, job_id, as_json, wanted.get(action or "", JobStatus.SUCCEEDED))
        view = client.view_job(job_id)
    if as_json:
        return _print_json(view.job)
    console.print(show.jobs_table([view.job]))
    console.print(show.plain(view.said), markup=False, soft_wrap=True)
    show.show_result(console, view.job)


def _job_words(words: list[str]) -> tuple[Literal["pause", "resume", "cancel", "events"] | None, str | None]:
    match words:
        case []:
            return None, None
        case [("pause" | "resume" | "cancel" | "events") as action]:
            return action, None
        case [("pause" | "resume" | "cancel" | "events") as action, job_id]:
            return action, job_id
        case [job_id]:
            return None, job_id
    raise typer.BadParameter("write: rookery jobs [pause|resume|cancel|events] JOB.", param_hint="JOB")


@app.command()
def runs(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="A job that has made a model.")],
    url: _Url = _DEFAULT_URL,
    as_json: _AsJson = False,
) -> None:
    """Tell what a job used and made: its runs, their data sets, settings, results and examples."""
    with Client(url) as client:
        listed = client.list_runs(job_id)
    if as_json:
        return _print_json(listed)
    for run in listed["data"]:
        show.show_run(console, run)
    if not listed["data"]:
        console.print("Nothing is recorded before a job has succeeded.")


def _follow(client: Client, job_id: str, as_json: bool, wanted: JobStatus = JobStatus.SUCCEEDED) -> None:
    """Shows the job until it has ended or paused; exits with 1 when it is not as `wanted` then."""
    if not as_json:
        console.print(f"Job {job_id}", markup=False, soft_wrap=True)
    try:
        with show.JobProgress(Console(stderr=True) if as_json else console) as progress:
            for view in client.follow(job_id):
                progress.update(view, "")
    except KeyboardInterrupt:
        typer.echo(f"\nThe job goes on. Follow it with: rookery jobs {job_id} --wait", err=True)
        raise typer.Exit(_EXIT_INTERRUPTED) from None
    if as_json:
        _print_json(view.job)
    else:
        show.show_result(console, view.job)
    if view.status is JobStatus.PAUSED:
        typer.echo(f"The job is paused. Go on with it: rookery jobs resume {job_id} --wait", err=True)
    if view.status is not wanted:
        reason = (view.job["error"] or {}).get("message") or view.said
        typer.echo(f"rookery: the job {view.status.value}: {show.plain(reason)}", err=True)
        raise typer.Exit(_EXIT_REFUSED)
    if view.status is JobStatus.SUCCEEDED and not as_json:
        model = view.job["fine_tuned_model"]
        console.print(
            f'{model} is ready. Try: rookery generate {model} "{PREVIEW_PROMPT}" -n 5', markup=False, soft_wrap=True
        )


@app.command()
def reproduce(
    model: _Model,
    archives: Annotated[
        list[Path] | None,
        typer.Option("--archive", exists=True, dir_okay=False, help="What it was made from, if that is not kept."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Keep the model that is made, in here.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse where anything is not as it was.")] = False,
    data: _Data = None,
    as_json: _AsJson = False,
) -> None:
    """Train a model again as it was trained, and compare the weights; no server is needed."""
    from deployments.reproduce import print_reproduction, reproduce_model

    done = reproduce_model(_settings(data), model, archives or [], out=out, strict=strict)
    print_reproduction(done, console, as_json=as_json)
    if not done.equal:
        raise typer.Exit(_EXIT_REFUSED)


# --- Using bots -------------------------------------------------------------------------------------------


@app.command()
def generate(
    model: _Model,
    prompt: Annotated[str, typer.Argument(help="How the text begins.")] = PREVIEW_PROMPT,
    n: Annotated[int, typer.Option("-n", min=1, max=MAX_CHOICES, help="How many texts.")] = 1,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same texts.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest text, in tokens.")] = 80,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0, help="0: always the likeliest.")] = None,
    url: _Url = _DEFAULT_URL,
    as_json: _AsJson = False,
) -> None:
    """Write texts with a bot."""
    body = {"model": model, "prompt": prompt, "n": n, "seed": seed, "max_tokens": max_tokens, "add_bos": True}
    if temperature is not None:
        body["temperature"] = temperature
    with Client(url) as client:
        if n == 1 and not as_json:
            return show.show_stream(console, prompt, client.stream(body))
        completion = client.complete(body)
    if as_json:
        return _print_json(completion)
    show.show_texts(console, prompt, [choice["text"] for choice in completion["choices"]])


@app.command("ls")
def list_models(
    query: Annotated[str | None, typer.Argument(help="Only models with this in their id.")] = None,
    limit: _Limit = 100,
    url: _Url = _DEFAULT_URL,
    as_json: _AsJson = False,
) -> None:
    """List the models that the server has."""
    with Client(url) as client:
        listed = client.list_models(limit=limit, query=query)
    if as_json:
        return _print_json(listed)
    console.print(show.models_table(listed["data"]))
    if listed["has_more"]:
        typer.echo(f"There are more than {limit}; use --limit, or name a part of the id.", err=True)


@app.command()
def ps(url: _Url = _DEFAULT_URL, as_json: _AsJson = False) -> None:
    """List the models that are in memory now."""
    with Client(url) as client:
        listed = client.list_residents()
    if as_json:
        return _print_json(listed)
    console.print(show.residents_table(listed["data"]))


@app.command("show")
def show_model(model: _Model, url: _Url = _DEFAULT_URL, as_json: _AsJson = False) -> None:
    """Tell what is known of a model."""
    with Client(url) as client:
        info = client.get_model(model)
    if as_json:
        return _print_json(info)
    console.print(
        show.facts_table(
            {
                "model": info["id"],
                "revision": info["revision"],
                "base": info["base_model"],
                "made by": info["owned_by"],
                "created": show.as_date(info["created"]),
                "size": show.as_bytes(info["bytes"]),
                "parameters": f"{info['num_parameters']:,}" if info["num_parameters"] else None,
                "context": info["context_length"],
            }
        )
    )
    if info["counts"]:
        console.print(show.counts_table(info["counts"]))


@app.command()
def versions(model: _Model, url: _Url = _DEFAULT_URL, as_json: _AsJson = False) -> None:
    """List the versions of a model; each one answers as MODEL@REVISION."""
    with Client(url) as client:
        listed = client.list_versions(model)
    if as_json:
        return _print_json(listed)
    console.print(show.versions_table(listed["data"]))


@app.command()
def rollback(
    model: _Model,
    revision: Annotated[str | None, typer.Argument(help="The one before, if none is named.")] = None,
    url: _Url = _DEFAULT_URL,
    as_json: _AsJson = False,
) -> None:
    """Have an earlier version of a model answer under its name; nothing is deleted."""
    with Client(url) as client:
        if revision is None:
            revision = _find_earlier(client.list_versions(model)["data"], model)
        version = client.roll_back(model, revision)
    if as_json:
        return _print_json(version)
    console.print(f"{version['model']} is now revision {version['revision']}.", markup=False, soft_wrap=True)


def _find_earlier(listed: list[dict[str, Any]], model: str) -> str:
    """Of finished models, newest first, the one after the one that answers now."""
    finished = [one for one in listed if one["step"] is None]
    position = next((i for i, one in enumerate(finished) if one["is_main"]), 0)
    if position + 1 >= len(finished):
        raise Refused(f"'{model}' has no version before the one that answers now; see: rookery versions {model}")
    return str(finished[position + 1]["revision"])


@app.command("rm")
def remove(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="The models to delete.")],
    url: _Url = _DEFAULT_URL,
    as_json: _AsJson = False,
) -> None:
    """Delete models from the server's disk and memory."""
    with Client(url) as client:
        deleted: list[dict[str, Any]] = []
        try:
            for model in models:
                deleted.append(client.delete_model(model))
                if not as_json:
                    console.print(f"{deleted[-1]['id']} is deleted.", markup=False, soft_wrap=True)
        finally:  # those before one that is refused are gone
            if as_json and deleted:
                _print_json({"object": "list", "data": deleted})


# --- The Hub ----------------------------------------------------------------------------------------------


@app.command()
def pull(
    model: Annotated[str, typer.Argument(metavar="MODEL[@REVISION]", help="For example huggingtweets/ada.")],
    url: _Url = _DEFAULT_URL,
    as_json: _AsJson = False,
) -> None:
    """Have the server fetch a model from the Hub, or its newest revision, and keep it."""
    from deployments.push import pull_model

    with Client(url) as client:
        try:
            info = pull_model(client, model)
        except KeyboardInterrupt:
            typer.echo(f"\nThe server goes on with it. See it with: rookery pull {model}", err=True)
            raise typer.Exit(_EXIT_INTERRUPTED) from None
    if as_json:
        return _print_json(info)
    console.print(f"{info['id']} is here as revision {info['revision']}.", markup=False, soft_wrap=True)


@app.command()
def push(
    model: Annotated[str, typer.Argument(metavar="MODEL[@REVISION]", help="For example huggingtweets/ada.")],
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
    url: _Url = _DEFAULT_URL,
    as_json: _AsJson = False,
) -> None:
    """Put a model on the Hugging Face Hub, with its card and picture, tagged with its revision.

    As you: by HF_TOKEN, or after `hf auth login`. What is pushed is what the Hub's `main` then is. Push again after an
    interruption: what has arrived is not sent again, and nothing changes where all of it is there. A card that was
    edited on the Hub stays until another revision is pushed.
    """
    from deployments.push import push_model

    with Client(url) as client:
        try:
            pushed = push_model(client, model, to=to, private=private, endpoint=endpoint)
        except KeyboardInterrupt:
            typer.echo("\nPush again: it goes on where it was.", err=True)
            raise typer.Exit(_EXIT_INTERRUPTED) from None
    if as_json:
        return _print_json(asdict(pushed))
    what = "was already at" if pushed.skipped else "is now at"
    console.print(f"{model} {what} {pushed.url} as {pushed.tag}.", markup=False, soft_wrap=True)


# --- The border -------------------------------------------------------------------------------------------


def _settings(data: Path | None) -> Settings:
    settings = Settings.from_env()
    return settings if data is None else replace(settings, data=data)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def main() -> None:
    """Runs the command of this process's arguments."""
    try:
        app()
    except (RookeryError, BadSetting) as error:
        typer.echo(f"rookery: {show.plain(str(error))}", err=True)
        sys.exit(_EXIT_NO_SERVER if isinstance(error, ServerUnreachable) else _EXIT_REFUSED)


if __name__ == "__main__":
    main()
