"""Catalogue, Files and Jobs that live in memory."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from serve.errors import BadUpload, Conflict, ModelNotFound, NotFound, NotOwner, TooFewTweets
from serve.types import (
    ALL_SEEING,
    Artifact,
    Checkpoint,
    CheckRoom,
    FileRecord,
    Job,
    JobEvent,
    JobRequest,
    JobStatus,
    ModelId,
    ModelInfo,
    Page,
    RepoFile,
    RevisionInfo,
    Run,
    TrainingFile,
    Viewer,
    Visibility,
)

T = TypeVar("T")

WHOLE = "0123456789" * 4  # a revision of every model, in full


def page(items: list[T], ids: list[str], limit: int, after: str | None) -> Page[T]:
    start = ids.index(after) + 1 if after in ids else 0
    return Page(tuple(items[start : start + limit]), start + limit < len(items))


class MemoryCatalogue:
    """Models with three versions each, newest first, of which the middle one is a checkpoint; `pictures` as given.

    `files`: of any version of a model, by its id.
    """

    def __init__(self, *model_ids: str) -> None:
        self.models = {
            id: ModelInfo(id, "abc123", 1_700_000_000, 10, "rookery", is_embedded=id == "fledgling") for id in model_ids
        }
        self.main: dict[str, str] = {}
        self.pictures: dict[str, Path] = {}
        self.avatars: dict[str, list[Path]] = {}
        self.previews: dict[str, tuple[str, bytes]] = {}  # id with revision -> text and picture, as chosen
        self.files: dict[str, tuple[RepoFile, ...]] = {}

    def list_models(
        self,
        *,
        limit: int,
        after: str | None = None,
        older_than: tuple[int, str] | None = None,
        query: str | None = None,
        owner: str | None = None,
        tags: Sequence[str] = (),
        newest_first: bool = False,
        viewer: Viewer = ALL_SEEING,
    ) -> Page[ModelInfo]:
        found = [
            info
            for info in self.models.values()
            if (query or "").lower() in info.model_id.lower()
            and (owner is None or info.model_id.lower().startswith(f"{owner.lower()}/"))
            and set(tags) <= set(info.tags)
            and viewer.may_see(info.owner, info.visibility is not Visibility.PUBLIC)
        ]
        if newest_first:
            found.sort(key=_age, reverse=True)
            found = [info for info in found if older_than is None or _age(info) < older_than]
        return page(found, [info.model_id for info in found], limit, after)

    def bytes_of(self, owner: str) -> int:
        return sum(info.num_bytes for info in self.models.values() if info.owner == owner)

    def count_models(self, *, viewer: Viewer = ALL_SEEING) -> int | None:
        return len(self.list_models(limit=len(self.models), viewer=viewer).items)

    def get_model(self, model_id: str, viewer: Viewer = ALL_SEEING) -> ModelInfo:
        name, _, revision = model_id.partition("@")
        if name not in self.models or revision not in ("", "main", "abc123", "abc122", "abc121", WHOLE):
            raise ModelNotFound("There is no such model.", param="model")
        info = self.models[name]
        if not viewer.may_see(info.owner, info.is_private):
            raise ModelNotFound("There is no such model.", param="model")
        return info if revision in ("", "main") else dataclasses.replace(info, revision=revision)

    def list_aliases(self, model_id: str) -> Mapping[str, str]:
        return {"main": self.main.get(model_id, self.get_model(model_id).revision)}

    def _check_right(self, model_id: str, viewer: Viewer) -> None:
        if not viewer.may_change(self.get_model(model_id, viewer).owner):
            raise NotOwner("This is somebody else's.")

    def set_visibility(self, model_id: str, visibility: Visibility, viewer: Viewer = ALL_SEEING) -> None:
        if model_id == "fledgling":
            raise Conflict("The embedded base model cannot be private.")
        self._check_right(model_id, viewer)
        self.models[model_id] = dataclasses.replace(self.get_model(model_id), visibility=visibility)

    def list_files(self, model_id: str, *, with_digests: bool = False) -> tuple[RepoFile, ...]:
        return self.files.get(self.get_model(model_id).model_id, ())

    def find_file(self, model_id: str, name: str) -> RepoFile:
        for file in self.list_files(model_id):
            if file.name == name:
                return file
        raise NotFound("The model has no such file.")

    def delete_model(self, model_id: str, viewer: Viewer = ALL_SEEING, *, by: str = "") -> str:
        spelled = next((known for known in self.models if known.lower() == model_id.lower()), model_id)
        self._check_right(spelled, viewer)
        if spelled == "fledgling":
            raise Conflict("The embedded base model cannot be deleted.")
        del self.models[spelled]
        return spelled

    def disable(self, model_id: str, *, by: str = "", reason: str = "") -> str:
        return self._set_disabled(model_id, True)

    def enable(self, model_id: str) -> str:
        return self._set_disabled(model_id, False)

    def _set_disabled(self, model_id: str, is_disabled: bool) -> str:
        self.models[model_id] = dataclasses.replace(self.get_model(model_id), is_disabled=is_disabled)
        return model_id

    def read_card(self, model_id: str) -> str:
        return f"# {self.get_model(model_id).model_id}"

    def find_picture(self, model_id: str) -> Path:
        name = str(ModelId.parse(model_id))
        self.get_model(name)
        if name not in self.pictures:
            raise ModelNotFound("The model has no picture.", param="model")
        return self.pictures[name]

    def find_avatar(self, model_id: str, number: int) -> Path:
        found = self.avatars.get(self.get_model(model_id).model_id, [])
        if number >= len(found):
            raise ModelNotFound("The model has no such face.", param="model")
        return found[number]

    def set_preview(self, model_id: str, text: str, picture: bytes, viewer: Viewer = ALL_SEEING) -> None:
        self._check_right(model_id, viewer)
        info = self.get_model(model_id)
        if info.model_id == "fledgling":
            raise Conflict("The embedded base model is shown as it is.")
        self.models[info.model_id] = dataclasses.replace(self.models[info.model_id], sample=text)
        self.previews[model_id] = (text, picture)

    def list_revisions(self, model_id: str, viewer: Viewer = ALL_SEEING) -> tuple[RevisionInfo, ...]:
        self.get_model(model_id, viewer)
        main = self.main.get(model_id, "abc123")
        return tuple(
            RevisionInfo(model_id, name, 1_700_000_000 - age, 10, name == main, "ftjob-0", step, {"train": 3.5})
            for age, (name, step) in enumerate([("abc123", None), ("abc122", 40), ("abc121", None)])
        )

    def roll_back(self, model_id: str, revision: str, viewer: Viewer = ALL_SEEING) -> RevisionInfo:
        self._check_right(model_id, viewer)
        found = {info.revision: info for info in self.list_revisions(model_id)}
        if revision not in found:
            raise ModelNotFound("There is no such revision.", param="revision")
        if found[revision].step is not None:
            raise Conflict("A checkpoint cannot be 'main'.", param="revision")
        self.main[model_id] = revision
        return dataclasses.replace(found[revision], is_main=True)


def _age(info: ModelInfo) -> tuple[int, str]:
    return info.created_at, info.model_id


class MemoryFiles:
    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.records: dict[str, FileRecord] = {}
        self._numbers = itertools.count()
        self._creating = threading.Lock()

    def create_file(
        self, source: Path, filename: str, purpose: str, owner: str = "", *, check_room: CheckRoom | None = None
    ) -> FileRecord:
        return self.keep_files([self.stage_file(source, filename, purpose, owner)], check_room=check_room)[0]

    def stage_file(self, source: Path, filename: str, purpose: str, owner: str = "") -> FileRecord:
        id = f"file-{next(self._numbers)}"
        return FileRecord(id, filename, source.stat().st_size, 1_700_000_000, purpose, source, owner)

    def keep_files(
        self, staged: Sequence[FileRecord], *, check_room: CheckRoom | None = None
    ) -> tuple[FileRecord, ...]:
        with self._creating:
            if check_room is not None and staged:
                check_room(self.bytes_of(staged[0].owner), sum(file.num_bytes for file in staged))
            for file in staged:
                path = file.path.rename(self.folder / file.id)
                self.records[file.id] = dataclasses.replace(file, path=path)
            return tuple(self.records[file.id] for file in staged)

    def get_file(self, file_id: str, viewer: Viewer = ALL_SEEING) -> FileRecord:
        if file_id not in self.records or not viewer.may_change(self.records[file_id].owner):
            raise NotFound("There is no such file.")
        return self.records[file_id]

    def list_files(
        self,
        *,
        limit: int,
        after: str | None = None,
        purpose: str | None = None,
        newest_first: bool = True,
        viewer: Viewer = ALL_SEEING,
    ) -> Page[FileRecord]:
        found = [record for record in self.records.values() if purpose in (None, record.purpose)]
        found = [record for record in found if viewer.may_change(record.owner)]
        found = found[::-1] if newest_first else found
        return page(found, [record.id for record in found], limit, after)

    def bytes_of(self, owner: str) -> int:
        return sum(record.num_bytes for record in self.records.values() if record.owner == owner)

    def delete_file(self, file_id: str) -> None:
        self.get_file(file_id).path.unlink()
        del self.records[file_id]


class MemoryJobs:
    """A handle called `short` has too little text to learn from. A job that has been paused has a checkpoint."""

    def __init__(self, files: MemoryFiles) -> None:
        self.files = files
        self.jobs: dict[str, Job] = {}
        self.keys: dict[tuple[str, str], tuple[JobRequest, str]] = {}
        self.forgotten: list[str] = []

    def create_job(
        self,
        request: JobRequest,
        *,
        idempotency_key: str | None = None,
        max_open: int | None = None,
        staged: Sequence[FileRecord] = (),
        check_room: CheckRoom | None = None,
    ) -> Job:
        fresh = {file.id: file for file in staged}

        def read(file: TrainingFile) -> TrainingFile:
            record = fresh.get(file.file_id) or self.files.get_file(file.file_id)
            return dataclasses.replace(file, file_id=record.path.read_bytes().hex())

        contents = dataclasses.replace(request, files=tuple(map(read, request.files)), validation_file=None)
        if idempotency_key is not None and (request.owner, idempotency_key) in self.keys:
            first, id = self.keys[request.owner, idempotency_key]
            if contents != first:
                raise Conflict("The key was used for another request.", param="idempotency-key")
            return self.jobs[id]
        if request.validation_file is not None and request.validation_file not in fresh:
            self.files.get_file(request.validation_file)
        for file in request.files:
            if file.handle == "short":
                raise TooFewTweets("@short has 3 tweets; at least 20 are needed.", param="training_file")
        self.files.keep_files(staged, check_room=check_room)
        id = f"ftjob-{len(self.jobs)}"
        self.jobs[id] = Job(id, request, JobStatus.QUEUED, 1_700_000_000, request.seed or 0)
        if idempotency_key is not None:
            self.keys[request.owner, idempotency_key] = contents, id
        return self.jobs[id]

    def get_job(self, job_id: str, viewer: Viewer = ALL_SEEING) -> Job:
        self.check_job(job_id, viewer)
        return self.jobs[job_id]

    def check_job(self, job_id: str, viewer: Viewer) -> None:
        if job_id not in self.jobs or not viewer.may_change(self.jobs[job_id].request.viewer.tenant):
            raise NotFound("There is no such job.")

    def list_jobs(
        self,
        *,
        limit: int,
        after: str | None = None,
        metadata: Mapping[str, str] | None = None,
        viewer: Viewer = ALL_SEEING,
    ) -> Page[Job]:
        found = [job for job in self.jobs.values() if _matches(job, metadata)][::-1]
        found = [job for job in found if viewer.may_change(job.request.viewer.tenant)]
        return page(found, [job.id for job in found], limit, after)

    def count_jobs(self) -> Mapping[JobStatus, int]:
        return Counter(job.status for job in self.jobs.values())

    def cancel_job(self, job_id: str) -> Job:
        self._require_open(job_id)
        return self._set(job_id, JobStatus.CANCELLED, finished_at=1_700_000_001)

    def pause_job(self, job_id: str) -> Job:
        self._require_open(job_id)
        return self._set(job_id, JobStatus.PAUSED)

    def resume_job(self, job_id: str) -> Job:
        if self.get_job(job_id).status is not JobStatus.PAUSED:
            raise Conflict(f"Job {job_id} is not paused.")
        return self._set(job_id, JobStatus.QUEUED)

    def _require_open(self, job_id: str) -> None:
        if self.get_job(job_id).status.is_final:
            raise Conflict(f"Job {job_id} has already ended.")

    def _set(self, job_id: str, status: JobStatus, **changes: Any) -> Job:
        self.jobs[job_id] = dataclasses.replace(self.jobs[job_id], status=status, **changes)
        return self.jobs[job_id]

    def list_events(self, job_id: str, *, limit: int, after: str | None = None) -> Page[JobEvent]:
        self.get_job(job_id)
        events = [
            JobEvent(f"ftevent-{i}", job_id, 1_700_000_000 + i, "info", f"Step {i}", "metrics", {"step": i})
            for i in reversed(range(3))
        ]
        return page(events, [event.id for event in events], limit, after)

    def list_checkpoints(self, job_id: str, *, limit: int, after: str | None = None) -> Page[Checkpoint]:
        self.get_job(job_id)
        checkpoints = [
            Checkpoint(
                f"ftckpt-{step}",
                job_id,
                1_700_000_000 + step,
                step,
                f"huggingtweets/ada@step{step}",
                {"train_loss": 3.5, "valid_loss": 3.75},
            )
            for step in (30, 20, 10)
        ]
        return page(checkpoints, [checkpoint.id for checkpoint in checkpoints], limit, after)

    def forget_model(self, model_id: str) -> None:
        self.forgotten.append(model_id)

    def list_runs(self, job_id: str) -> tuple[Run, ...]:
        if self.get_job(job_id).status is not JobStatus.SUCCEEDED:
            return ()
        raw, data = Artifact("raw-dataset", "tweets-ada", "aa", 0), Artifact("train-dataset", "dataset-ada", "bb", 1)
        model = Artifact("finetuned-model", "ada", "cc", 2, {"revision": "abc123"})
        table = {"columns": ["Input", "Prediction"], "data": [["My dream is", " tea."]]}
        return (
            Run(job_id, "preprocess", "@ada-preprocess", 1, 2, inputs=(raw,), outputs=(data,)),
            Run(
                *(job_id, "train", "@ada-train", 2, 3),
                config={"n_epochs": 4},
                summary={"train_loss": 3.5},
                history={"step": [1, 2], "train_loss": [4.0, float("nan")]},
                tables={"examples": table},
                inputs=(data,),
                outputs=(model,),
            ),
        )


def _matches(job: Job, metadata: Mapping[str, str] | None) -> bool:
    if metadata is not None and not metadata:
        return not job.request.metadata
    return (metadata or {}).items() <= job.request.metadata.items()


def memory_preview(paths: Sequence[Path], handle: Sequence[str | None], *, filenames: Sequence[str]) -> dict[str, Any]:
    """What came under which name. Bytes that begin with `junk` are no archive."""
    contents = [path.read_bytes() for path in paths]
    if any(content.startswith(b"junk") for content in contents):
        raise BadUpload("This is no archive.", param="file")
    return {"handles": handle, "files": [[name, data.decode()] for name, data in zip(filenames, contents, strict=True)]}


def memory_draw_preview(info: ModelInfo, avatars: Sequence[bytes], text: str, /, *, prompt: str) -> bytes:
    """All that it was told."""
    return repr((info.model_id, list(avatars), text, prompt)).encode()
