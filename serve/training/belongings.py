"""What is here of a person: which models, jobs and files, by what these say of themselves.

A person's are the archives that say so or were given as theirs, the jobs that read one, the models of which any version
has learnt from them, and whatever was trained on top of such a model. Nobody finds, in any of this, what they may not
see.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select

from serve.database.connection import Database
from serve.database.tables import FileRow, JobRow
from serve.errors import BadUpload, ModelNotFound
from serve.store.burials import handles_in_name
from serve.store.describe import provenance_of
from serve.store.revisions import Revision, Store
from serve.training.archives import read_archive
from serve.training.archives.tweets import as_handle
from serve.training.jobs.rows import of_viewer
from serve.types import BOT_PURPOSE, TRAINING_PURPOSE, Belongings, Viewer


@dataclass(frozen=True, slots=True)
class _Model:
    """All versions of one model. Names are in lower case, here and below."""

    model_id: str
    is_own: bool  # the viewer's to erase; others' that they may see only tell what was made of them
    people: frozenset[str]
    jobs: frozenset[str]  # that made one
    bases: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Job:
    id: str
    people: frozenset[str]
    model: str  # "" where it has not read its archives
    base: str
    given: Mapping[str, str | None]  # file that it learns from -> whose its uploader said it is
    validation: str | None
    results: tuple[str, ...]

    @property
    def files(self) -> set[str]:
        return {*self.given, *([self.validation] if self.validation else [])}


class Finder:
    """Looks in `store`, in the jobs of `database` and in the `uploads`. What an archive has said is remembered."""

    def __init__(self, store: Store, database: Database, uploads: Path) -> None:
        self._store, self._database, self._uploads = store, database, uploads
        self._read: dict[str, str | None] = {}  # file -> whose its archive says it is

    def find(self, name: str, viewer: Viewer) -> Belongings:
        """`name` in lower case. Only what is the viewer's to change. Raises: StoreUnavailable."""
        models = {model.model_id.lower(): model for model in self._models(viewer)}
        with self._database.read() as session:
            rows = session.scalars(select(JobRow).where(*of_viewer(JobRow.tenant, viewer)).order_by(JobRow.seq))
            told = [(row.id, row.request, row.result or {}, row.fine_tuned_model) for row in rows]
            found = session.scalars(select(FileRow).where(*of_viewer(FileRow.owner, viewer)))
            files = {file.id: (file.filename, file.purpose) for file in found}
        says = self._say(files, [result for _, _, result, _ in told])
        jobs = [_to_job(*one, says) for one in told]
        about = {job.id for job in jobs if name in job.people}
        model_ids, job_ids = _close(name, models, jobs, about)
        return Belongings(
            tuple(sorted(models[one].model_id for one in model_ids if models[one].is_own)),
            tuple(job.id for job in jobs if job.id in job_ids),
            tuple(_files_of(name, files, says, jobs, about, job_ids)),
        )

    def forget(self, file_ids: Iterable[str]) -> None:
        for file_id in file_ids:
            self._read.pop(file_id, None)

    def _models(self, viewer: Viewer) -> Iterator[_Model]:
        for model_id in self._store.model_ids():
            if revisions := [one for one in self._revisions(model_id) if viewer.may_see(one.owner, one.is_private)]:
                said = [provenance_of(one.path) for one in revisions]
                yield _Model(
                    model_id,
                    viewer.may_change(revisions[0].owner),
                    frozenset(name for one in said for name in _people_in(one) or handles_in_name(model_id)),
                    frozenset(str(one["job_id"]) for one in said if one.get("job_id")),
                    frozenset(_whole(str(one["base_model"])) for one in said if one.get("base_model")),
                )

    def _revisions(self, model_id: str) -> list[Revision]:
        """Also checkpoints of which nothing has come yet, and what was put here by hand."""
        found = {one.path: one for one in self._store.published(model_id)}
        with suppress(ModelNotFound):
            main = self._store.locate(model_id)
            found[main.path] = main
        return list(found.values())

    def _say(self, files: Mapping[str, tuple[str, str]], results: Iterable[Mapping[str, Any]]) -> dict[str, str | None]:
        """File -> whose its archive says it is: as a job has recorded it, else it is read, once."""
        recorded = {file_id: handle for result in results for file_id, handle in result.get("handles", {}).items()}
        says = {file_id: handle and handle.lower() for file_id, handle in recorded.items()}
        for file_id, (filename, purpose) in files.items():
            if file_id not in says and purpose in (TRAINING_PURPOSE, BOT_PURPOSE):
                if file_id not in self._read:
                    with suppress(OSError):
                        self._read[file_id] = self._read_handle(file_id, filename)
                says[file_id] = self._read.get(file_id)
        return says

    def _read_handle(self, file_id: str, filename: str) -> str | None:
        try:
            handle = read_archive(self._uploads / file_id, filename=filename).handle
        except BadUpload:
            return None
        return handle and handle.lower()


def _close(
    name: str, models: Mapping[str, _Model], jobs: Collection[_Job], about: set[str]
) -> tuple[set[str], set[str]]:
    """The models and jobs that have learnt from them: themselves, or by what they were trained on."""
    bases = {base for model in models.values() for base in model.bases} | {job.base for job in jobs}
    named = {base for base in bases - models.keys() if name in _people_in_name(base)}
    their_models, their_jobs = set[str](), about
    while True:
        # What was deleted meanwhile may still be in what was made of it.
        gone = {job.model for job in jobs if job.id in their_jobs} - {"", *models}
        theirs = their_models | gone | named
        more_models = {
            model_id
            for model_id, model in models.items()
            if name in model.people or model.jobs & their_jobs or model.bases & theirs
        }
        more_jobs = about | {job.id for job in jobs if job.model in more_models or job.base in theirs}
        if (more_models, more_jobs) == (their_models, their_jobs):
            return their_models, their_jobs
        their_models, their_jobs = more_models, more_jobs


def _files_of(
    name: str,
    files: Iterable[str],
    says: Mapping[str, str | None],
    jobs: Collection[_Job],
    about: Set[str],
    theirs: Set[str],
) -> Iterator[str]:
    """What says that it is theirs or was given as theirs; and, where nothing says whose it is, what their jobs used."""
    given = {file_id for job in jobs for file_id, handle in job.given.items() if handle == name}
    results = {file_id for job in jobs if job.id in theirs for file_id in job.results}
    unsaid = {file_id for job in jobs if job.id in about for file_id in job.files if not job.given.get(file_id)}
    # Of a job that says nobody it is not known that it is somebody else's.
    used_by_others = {file_id for job in jobs if job.people and job.id not in theirs for file_id in job.files}
    for file_id in files:
        said = says.get(file_id)
        is_used = file_id in given | results or (said is None and file_id in unsaid)
        if said == name or (is_used and file_id not in used_by_others):
            yield file_id


def _to_job(
    job_id: str,
    request: Mapping[str, Any],
    result: Mapping[str, Any],
    model: str | None,
    says: Mapping[str, str | None],
) -> _Job:
    given = {entry["file_id"]: _bare(entry["handle"]) for entry in request["files"]}
    counted = {handle.lower() for handle in result.get("counts") or {}}
    said = {handle for file_id, handle in given.items() for handle in (handle, says.get(file_id)) if handle}
    suffix = request.get("suffix")
    if suffix and not counted and any(not (handle or says.get(file_id)) for file_id, handle in given.items()):
        said.add(_bare(suffix) or "")  # as `preprocess` calls whom nothing names
    return _Job(
        job_id,
        frozenset(counted | said),
        (model or result.get("model_id") or "").lower(),
        _whole(request["base_model"]),
        given,
        request.get("validation_file"),
        tuple(result.get("result_files", ())),
    )


def _bare(handle: str | None) -> str | None:
    """Without '@', as handles are compared."""
    return handle and (as_handle(handle) or handle).lower()


def _people_in(provenance: Mapping[str, Any]) -> set[str]:
    said = provenance.get("handles")
    return {handle.lower() for handle in said if isinstance(handle, str)} if isinstance(said, list) else set()


def _people_in_name(model_id: str) -> set[str]:
    with suppress(ModelNotFound):
        return handles_in_name(model_id)
    return set()


def _whole(model_id: str) -> str:
    return model_id.partition("@")[0].lower()
