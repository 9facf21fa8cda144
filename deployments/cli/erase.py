"""`rookery erase`: all that a service keeps of a person or of a model, in one go, with a receipt.

Of a person the server knows what belongs to whom. Of a model that is known here by what the server lists: jobs by which
model they made, files by the jobs that used them.
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

_STOP_TIMEOUT_S = 60.0  # a job asks whether it is cancelled after each step
_ERASE_TIMEOUT_S = 300.0
_POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Belongings:
    """What is to go. `people`: what the server says of each that it has anything of."""

    people: list[Json]
    models: list[Json]
    open_jobs: list[str]
    files: list[str]

    def __bool__(self) -> bool:
        return bool(self.people or self.models or self.open_jobs or self.files)


@dataclass(slots=True)
class Receipt:
    """What is gone, as far as it went. `people`: the server's own receipts; `jobs`: those that were cancelled."""

    models: list[str] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    people: list[Json] = field(default_factory=list)


@command(
    USE,
    """
    rookery erase @ada
    rookery erase huggingtweets/ada huggingtweets/bob
    rookery erase @ada --yes --json > receipt.json
    rookery erase @ada --lift
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
    lift: Annotated[
        bool, typer.Option("--lift", help="Let these people be learnt from again; brings nothing back.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Delete all that the server has of a person, or of a model, for good.

    Of a person: every model of which any version has learnt from them, cyborgs with others too, or was trained on top
    of such a model; all that their jobs wrote, and the uploads that are still there. Open jobs are cancelled, and
    nobody can make or fetch a bot of them until that is lifted. A key without the scope admin erases what is its
    tenant's, and closes nothing to others. Of a model: all its versions, its picture and card, the texts in the records
    of its jobs, and the uploads. That a job was, and when, stays on record.

    It does not reach copies elsewhere: what was pushed to a Hub, downloaded, backed up, or told to a tracker outside.
    """
    with Client(url) as client:
        if lift:
            return _lift(client, names, as_json)
        found = find_belongings(client, names)
        if not found:
            raise NotFound(_nothing_of(client, names))
        if not yes:
            _ask(client, found)
        receipt = Receipt()
        try:
            _erase(client, names, found, receipt)
        finally:  # what went before something that is refused is gone
            if as_json:
                print_json({"object": "erasure", "of": names, **asdict(receipt)})
            else:
                _tell(receipt)


def _lift(client: Client, names: Sequence[str], as_json: bool) -> None:
    """Raises: typer.BadParameter, NotFound."""
    if models := [name for name in names if not name.startswith("@")]:
        raise typer.BadParameter(f"'{models[0]}' is no person: write '@handle'.", param_hint="--lift")
    lifted = [said["handle"] for name in names if (said := client.lift_erasure(name))["lifted"]]
    if as_json:
        print_json({"object": "erasure.lift", "of": names, "lifted": lifted})
    for person in lifted:
        tell(f"{person} may be learnt from again.")
    if not lifted:
        raise NotFound(f"Nothing was erased of {' or '.join(names)}.")


def _nothing_of(client: Client, names: Sequence[str]) -> str:
    people = [f"@{name}" for name in names if not name.startswith("@") and "/" not in name]
    meant = [person for person in people if find_belongings(client, [person])]
    hint = f" Did you mean {' and '.join(meant)}?" if meant else ""
    return f"The server has nothing of {' or '.join(names)}.{hint}"


def _ask(client: Client, found: Belongings) -> None:
    """Raises: typer.BadParameter where nobody can be asked; typer.Exit when they do not say yes."""
    if not is_attended():
        raise typer.BadParameter(
            "nobody can be asked here; say --yes to delete without a question.", param_hint="--yes"
        )
    of_people = {model_id for person in found.people for model_id in person["models"]}
    models = [*found.models, *(model for model in client.all_models() if model["id"] in of_people)]
    if models:
        show.show_table(remarks, show.models_table(models))
    num_jobs = len(found.open_jobs) + sum(len(person["jobs"]) for person in found.people)
    num_files = len(found.files) + sum(len(person["files"]) for person in found.people)
    if not confirm(f"Delete {_counted(len(models), num_jobs, num_files)} for good?"):
        typer.echo("rookery: nothing was deleted.", err=True)
        raise typer.Exit(Exit.REFUSED)


def _tell(receipt: Receipt) -> None:
    for model in receipt.models:
        tell(f"{model} is deleted.")
    num_models, num_jobs, num_files = len(receipt.models), len(receipt.jobs), len(receipt.files)
    remark(f"Deleted: {_counted(num_models, num_jobs, num_files)}. Copies elsewhere, as on a Hub, stay.")
    for person in receipt.people:
        for sentence in person["unreached"]:
            remark(sentence)


def _counted(num_models: int, num_jobs: int, num_files: int) -> str:
    counts = {"model": num_models, "job": num_jobs, "file": num_files}
    return ", ".join(f"{count} {what}{'' if count == 1 else 's'}" for what, count in counts.items())


def _erase(client: Client, names: Sequence[str], found: Belongings, receipt: Receipt) -> None:
    for person in found.people:
        _erase_person(client, person["handle"], receipt)
    for job_id in found.open_jobs:
        _stop(client, job_id)
        receipt.jobs.append(job_id)
    if found.open_jobs:  # one may have made its model just before
        found = find_belongings(client, [name for name in names if not name.startswith("@")])
    for model in found.models:
        with _unless_gone():
            receipt.models.append(client.delete_model(model["id"])["id"])
    for file_id in found.files:
        with _unless_gone():
            receipt.files.append(client.delete_file(file_id)["id"])


def _erase_person(client: Client, handle: str, receipt: Receipt) -> None:
    """Raises: Refused where it fails, or does not end in time."""
    begun = client.begin_erasure(handle)
    deadline = time.monotonic() + _ERASE_TIMEOUT_S
    while (done := client.get_erasure(begun["id"]))["status"] == "running":
        if time.monotonic() > deadline:
            raise Refused(f"The server is not done with {handle} yet: see {begun['id']}, or erase again.")
        time.sleep(_POLL_S)
    if done["status"] == "failed":
        raise Refused(f"{handle} is not wholly erased: {done['error']} Erase again.")
    receipt.people.append(done)
    receipt.models += done["models"]
    receipt.jobs += done["jobs"]
    receipt.files += done["files"]


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
    names = list(dict.fromkeys(names))
    people = [client.begin_erasure(name, dry_run=True) for name in names if name.startswith("@")]
    people = [person for person in people if person["models"] or person["jobs"] or person["files"]]
    named = {_whole_model(name).lower() for name in names if not name.startswith("@")}
    if not named:
        return Belongings(people, [], [], [])
    open_jobs: list[str] = []
    files: set[str] = set()
    files_of_others: set[str] = set()
    for job in client.all_jobs():
        if _model_of(job) not in named:
            files_of_others |= _files_of(job)
            continue
        files |= _files_of(job)
        if not JobStatus(job["status"]).is_final:
            open_jobs.append(job["id"])
    files -= files_of_others
    models = [model for model in client.all_models() if model["id"].lower() in named]
    return Belongings(people, models, open_jobs, [file["id"] for file in client.all_files() if file["id"] in files])


def _whole_model(name: str) -> str:
    parsed = ModelId.parse(name)
    if parsed.revision is not None:
        raise typer.BadParameter(f"'{name}' is one version; name the whole model.", param_hint="MODEL")
    return str(parsed)


def _model_of(job: Json) -> str:
    """That it made or, once it has read its archives, would make."""
    name: str = job["fine_tuned_model"] or job["result"].get("model_id") or ""
    return name.lower()


def _files_of(job: Json) -> set[str]:
    """Those that it read and made."""
    read = {file["file_id"] for file in job["training_files"]}
    return read | {*job["result_files"], *filter(None, [job["validation_file"]])}
