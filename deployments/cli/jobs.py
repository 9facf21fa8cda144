"""`rookery jobs`: training jobs listed, looked at, followed, paused, resumed and cancelled."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Annotated, Literal, NoReturn

import typer

from deployments import show
from deployments.cli.app import MAKE, Exit, command, group
from deployments.cli.options import (
    DEFAULT_URL,
    AsJson,
    Job,
    Limit,
    Url,
    console,
    print_json,
    remark,
    remarks,
)
from deployments.cli.terminal import confirm, is_attended
from deployments.client import Client, JobView, Json
from deployments.progress import JobProgress
from deployments.stopping import interrupts_held
from serve.types import PREVIEW_PROMPT, JobStatus

_NUM_JOBS = 20
_SECOND_CTRL_C_S = 3.0

jobs = group(
    MAKE,
    "jobs",
    """
    rookery jobs
    rookery jobs logs -f ftjob-1234
    rookery jobs cancel ftjob-1234
    """,
    about="List, follow, pause, resume and cancel training jobs.",
    is_verb=True,
)

_Wait = Annotated[bool, typer.Option("--wait", help="Stay until the job has ended or paused.")]


@jobs.callback(invoke_without_command=True)
def _jobs(
    context: typer.Context,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but the ids.")] = False,
) -> None:
    """List, follow, pause, resume and cancel training jobs."""
    if context.invoked_subcommand is None:
        remarks.quiet = remarks.quiet or quiet
        list_jobs(url=os.environ.get("ROOKERY_URL", DEFAULT_URL), as_json=as_json)
    elif as_json or quiet:
        raise typer.BadParameter(f"write it behind '{context.invoked_subcommand}'.", param_hint="--json or --quiet")


@command(
    MAKE,
    """
    rookery jobs ls
    rookery jobs ls --limit 100 --json
    """,
    name="ls",
    of=jobs,
)
def list_jobs(limit: Limit = _NUM_JOBS, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """List training jobs, the newest first; with --quiet their ids alone."""
    with Client(url) as client:
        listed = client.list_jobs(limit=limit)
    if as_json:
        return print_json(listed)
    if remarks.quiet:
        return show.show_ids(console, listed["data"])
    show.show_table(console, show.jobs_table(listed["data"]))
    if listed["has_more"]:
        remark(f"There are more than {limit}; use --limit.")


@command(
    MAKE,
    """
    rookery jobs show ftjob-1234
    rookery jobs show ftjob-1234 --json
    """,
    name="show",
    of=jobs,
)
def show_job(job_id: Job, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Tell how a job stands, and what it has made."""
    with Client(url) as client:
        view = client.view_job(job_id)
    _print_job(view, as_json)


@command(
    MAKE,
    """
    rookery jobs logs ftjob-1234
    rookery jobs logs ftjob-1234 -f
    rookery jobs logs ftjob-1234 --json | jq -r .message
    """,
    of=jobs,
)
def logs(
    job_id: Job,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Stay until the job has ended or paused; exits as `wait` does.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", min=0, help="Of what has been, only so many last lines.")
    ] = None,
    url: Url = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, an event a line.")] = False,
) -> None:
    """Tell the history of a job, oldest first."""
    with Client(url) as client:
        if not follow:
            return _print_events(_last(client.events_since(job_id, ""), limit), as_json)
        try:
            for number, view in enumerate(client.follow(job_id, seen="")):
                _print_events(view.events if number else _last(view.events, limit), as_json)
        except KeyboardInterrupt:
            leave(client, job_id, f"rookery jobs logs {job_id} -f")
    _judge(view, JobStatus.SUCCEEDED)


def _last(events: Sequence[Json], limit: int | None) -> Sequence[Json]:
    return events if limit is None else events[max(0, len(events) - limit) :]


def _print_events(events: Sequence[Json], as_json: bool) -> None:
    for event in events:
        if as_json:
            typer.echo(show.json_text(event))
        else:
            console.print(show.event_line(event), soft_wrap=True)


@command(
    MAKE,
    """
    rookery jobs wait ftjob-1234
    rookery jobs wait ftjob-1234 --json
    """,
    of=jobs,
)
def wait(job_id: Job, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Stay until a job has ended or paused; 1 is the end of one that made no model."""
    with Client(url) as client:
        follow_job(client, job_id, as_json=as_json)


@command(
    MAKE,
    """
    rookery jobs pause ftjob-1234
    rookery jobs pause ftjob-1234 --wait
    """,
    of=jobs,
)
def pause(job_id: Job, wait: _Wait = False, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Have a job stop after its next step, to go on later from there."""
    _change(job_id, "pause", JobStatus.PAUSED, wait=wait, url=url, as_json=as_json)


@command(
    MAKE,
    """
    rookery jobs resume ftjob-1234
    rookery jobs resume ftjob-1234 --wait
    """,
    of=jobs,
)
def resume(job_id: Job, wait: _Wait = False, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Have a paused job go on."""
    _change(job_id, "resume", JobStatus.SUCCEEDED, wait=wait, url=url, as_json=as_json)


@command(
    MAKE,
    """
    rookery jobs cancel ftjob-1234
    rookery jobs cancel ftjob-1234 --json
    """,
    of=jobs,
)
def cancel(job_id: Job, wait: _Wait = False, url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """End a job for good; it makes no model."""
    _change(job_id, "cancel", JobStatus.CANCELLED, wait=wait, url=url, as_json=as_json)


def _change(
    job_id: str,
    change: Literal["pause", "resume", "cancel"],
    wanted: JobStatus,
    *,
    wait: bool,
    url: str,
    as_json: bool,
) -> None:
    with Client(url) as client:
        client.change_job(job_id, change)
        if wait:
            return follow_job(client, job_id, wanted, as_json=as_json)
        view = client.view_job(job_id)
    _print_job(view, as_json)
    if change == "cancel" and not view.status.is_final:
        remark(f"Cancelling ... it stops after its next step. Stay until then: rookery jobs wait {job_id}")


def _print_job(view: JobView, as_json: bool) -> None:
    if as_json:
        return print_json(view.job)
    show.show_table(console, show.jobs_table([view.job]))
    console.print(show.plain(view.said), markup=False, soft_wrap=True)
    show.show_result(console, view.job)


# --- To follow a job --------------------------------------------------------------------------------------


def follow_job(client: Client, job_id: str, wanted: JobStatus = JobStatus.SUCCEEDED, *, as_json: bool) -> None:
    """Shows the job until it has ended or paused; exits with 1 when it is not as `wanted` then."""
    try:
        remark(f"Job {job_id}")
        with JobProgress(remarks) as progress:
            for view in client.follow(job_id):
                progress.update(view, "")
    except KeyboardInterrupt:
        leave(client, job_id, f"rookery jobs wait {job_id}")
    if as_json:
        print_json(view.job)
    else:
        show.show_result(console, view.job)
    _judge(view, wanted)
    if view.status is JobStatus.SUCCEEDED:
        model = view.job["fine_tuned_model"]
        remark(f'{model} is ready. Try: rookery generate {model} "{PREVIEW_PROMPT}" -n 5')


def _judge(view: JobView, wanted: JobStatus) -> None:
    """Raises: typer.Exit with 1 when the job is not as `wanted`."""
    if view.status is JobStatus.PAUSED:
        remark(f"The job is paused. Go on with it: rookery jobs resume {view.job['id']} --wait")
    if view.status is not wanted:
        reason = (view.job["error"] or {}).get("message") or view.said
        typer.echo(f"rookery: the job {view.status.value}: {show.plain(reason)}", err=True)
        raise typer.Exit(Exit.REFUSED)


def leave(client: Client, job_id: str, again: str) -> NoReturn:
    """After a Ctrl-C: the job goes on, unless a second one and a yes cancel it. `again`: how to follow it then."""
    try:
        with interrupts_held():
            remark(f"\nThe job goes on. Follow it with: {again}")
            if is_attended():
                remark(f"Press Ctrl-C again within {_SECOND_CTRL_C_S:g} s to cancel it.")
        if is_attended():
            time.sleep(_SECOND_CTRL_C_S)
    except KeyboardInterrupt:
        if is_attended() and confirm("\nCancel the job?"):
            _cancel(client, job_id)
    raise typer.Exit(Exit.INTERRUPTED)


def _cancel(client: Client, job_id: str) -> None:
    client.change_job(job_id, "cancel")
    remark("Cancelling ...")
    *_, view = client.follow(job_id)
    remark(f"The job is {view.status.value}." if view.status is JobStatus.CANCELLED else f"It had {view.status.value}.")
