"""`rookery erase`: all that a service keeps of a person or of a model, in one go, with a receipt.

Knows what belongs together by what the server lists: models by whom they learnt from, jobs by whose archives they
read or which model they made, files by the jobs that used them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Annotated

import typer

from deployments import show
from deployments.cli.app import USE, Exit, command
from deployments.cli.options import DEFAULT_URL, AsJson, Url, print_json, remark, remarks, tell
from deployments.cli.terminal import confirm, is_attended
from deployments.cli.words import complete_models
from deployments.client import Client, Json, Refused
from serve.errors import NotFound
from serve.types import JobStatus, ModelId

_HUGGINGTWEETS = "huggingtweets"
_STOP_TIMEOUT_S = 60.0  # a job asks whether it is cancelled after each step


@dataclass(frozen=True, slots=True)
class Belongings:
    """What is to go."""

    models: list[Json]
    open_jobs: list[str]
    files: list[str]

    def __bool__(self) -> bool:
        return bool(self.models or self.open_jobs or self.files)


@dataclass(slots=True)
class Receipt:
    """What is gone, as far as it went."""

    models: list[str] = field(default_factory=list)
    jobs_cancelled: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


@command(
    USE,
    """
    rookery erase @ada
    rookery erase huggingtweets/ada huggingtweets/bob
    rookery erase @ada --yes --json > receipt.json
    """,
)
def erase(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="@HANDLE|MODEL",
            help="People, with '@', or models; several of either.",
            autocompletion=complete_models,
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Delete all that the server has of a person, or of a model, for good.

    Of a person: every model that has learnt from them, cyborgs with others too. With a model go all its versions,
    its picture and card, the texts in the records of its jobs, and the uploads that are still there; open jobs are
    cancelled. That a job was, with its numbers, stays on record.

    It does not reach copies elsewhere: what was pushed to a Hub, downloaded, backed up, or told to a tracker.
    """
    with Client(url) as client:
        found = find_belongings(client, names)
        if not found:
            raise NotFound(_nothing_of(client, names))
        if not yes:
            _ask(found)
        receipt = Receipt()
        try:
            _erase(client, names, found, receipt)
        finally:  # what went before something that is refused is gone
            if as_json:
                print_json({"object": "erasure", "of": names, **asdict(receipt)})
            else:
                _tell(receipt)


def _nothing_of(client: Client, names: Sequence[str]) -> str:
    people = [f"@{name}" for name in names if not name.startswith("@") and "/" not in name]
    meant = [person for person in people if find_belongings(client, [person])]
    hint = f" Did you mean {' and '.join(meant)}?" if meant else ""
    return f"The server has nothing of {' or '.join(names)}.{hint}"


def _ask(found: Belongings) -> None:
    """Raises: typer.BadParameter where nobody can be asked; typer.Exit when they do not say yes."""
    if not is_attended():
        raise typer.BadParameter(
            "nobody can be asked here; say --yes to delete without a question.", param_hint="--yes"
        )
    if found.models:
        show.show_table(remarks, show.models_table(found.models))
    if not confirm(f"Delete {_counted(len(found.models), len(found.open_jobs), len(found.files))} for good?"):
        typer.echo("rookery: nothing was deleted.", err=True)
        raise typer.Exit(Exit.REFUSED)


def _tell(receipt: Receipt) -> None:
    for model in receipt.models:
        tell(f"{model} is deleted.")
    num_models, num_jobs, num_files = len(receipt.models), len(receipt.jobs_cancelled), len(receipt.files)
    remark(f"Deleted: {_counted(num_models, num_jobs, num_files)}. Copies elsewhere, as on a Hub, stay.")


def _counted(num_models: int, num_jobs: int, num_files: int) -> str:
    counts = {"model": num_models, "open job": num_jobs, "file": num_files}
    return ", ".join(f"{count} {what}{'' if count == 1 else 's'}" for what, count in counts.items())


def _erase(client: Client, names: Sequence[str], found: Belongings, receipt: Receipt) -> None:
    for job_id in found.open_jobs:
        _stop(client, job_id)
        receipt.jobs_cancelled.append(job_id)
    if found.open_jobs:  # one may have made its model just before
        found = find_belongings(client, names)
    for model in found.models:
        with _unless_gone():
            receipt.models.append(client.delete_model(model["id"])["id"])
    for file_id in found.files:
        with _unless_gone():
            receipt.files.append(client.delete_file(file_id)["id"])


def _stop(client: Client, job_id: str) -> None:
    """Raises: Refused where the job does not end in time."""
    with suppress(Refused):  # it has just ended
        client.change_job(job_id, "cancel")
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    for view in client.follow(job_id):
        if not view.status.is_final and time.monotonic() > deadline:
            raise Refused(f"Job {job_id} has not stopped yet; erase again in a minute.")


@contextmanager
def _unless_gone() -> Iterator[None]:
    try:
        yield
    except Refused as exc:
        if exc.status != 404:
            raise


# --- What belongs to whom ---------------------------------------------------------------------------------


def find_belongings(client: Client, names: Iterable[str]) -> Belongings:
    """All that the server has of people, "@handle", and of models. Raises: ModelNotFound for what is no name of one."""
    handles = {name[1:].lower() for name in names if name.startswith("@")}
    named = {_whole_model(name).lower() for name in names if not name.startswith("@")}
    models = [model for model in client.all_models() if model["id"].lower() in named or _is_of(model, handles)]
    model_ids = named | {model["id"].lower() for model in models}
    open_jobs: list[str] = []
    files: set[str] = set()
    files_of_others: set[str] = set()
    for job in client.all_jobs():
        if not (is_named := _model_of(job) in named) and _model_of(job) not in model_ids and not handles & _people(job):
            files_of_others |= _files_of(job)
            continue
        files |= _files_of(job, None if is_named else handles)
        if not JobStatus(job["status"]).is_final:
            open_jobs.append(job["id"])
    files -= files_of_others
    return Belongings(models, open_jobs, [file["id"] for file in client.all_files() if file["id"] in files])


def _whole_model(name: str) -> str:
    parsed = ModelId.parse(name)
    if parsed.revision is not None:
        raise typer.BadParameter(f"'{name}' is one version; name the whole model.", param_hint="MODEL")
    return str(parsed)


def _is_of(model: Json, handles: set[str]) -> bool:
    """Where nobody recorded whom it learnt from, its name tells: huggingtweets' own are called so."""
    if known := {handle.lower() for handle in model["handles"]}:
        return bool(known & handles)
    owner, _, name = model["id"].lower().rpartition("/")
    return owner == _HUGGINGTWEETS and not handles.isdisjoint({name, *name.split("-")})


def _model_of(job: Json) -> str:
    """That it made or, once it has read its archives, would make."""
    name: str = job["fine_tuned_model"] or job["result"].get("model_id") or ""
    return name.lower()


def _people(job: Json) -> set[str]:
    said = {file["handle"] for file in job["training_files"]} | set(job["result"].get("counts") or {})
    return {handle.lower() for handle in said if handle}


def _files_of(job: Json, handles: set[str] | None = None) -> set[str]:
    """Those that it read and made; with `handles`, without archives of other people."""
    others = {file["file_id"] for file in job["training_files"] if handles and not _is_whose(file, handles)}
    read = {file["file_id"] for file in job["training_files"]} - others
    return read | {*job["result_files"], *filter(None, [job["validation_file"]])}


def _is_whose(file: Json, handles: set[str]) -> bool:
    return not file["handle"] or file["handle"].lower() in handles
