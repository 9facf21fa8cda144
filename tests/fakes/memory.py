"""Catalogue, Files and Jobs that live in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from serve.errors import Conflict, ModelNotFound, NotFound, TooFewTweets
from serve.types import FileRecord, Job, JobEvent, JobRequest, JobStatus, ModelInfo, Page

T = TypeVar("T")


def page(items: list[T], ids: list[str], limit: int, after: str | None) -> Page[T]:
    start = ids.index(after) + 1 if after in ids else 0
    return Page(tuple(items[start : start + limit]), start + limit < len(items))


class MemoryCatalogue:
    def __init__(self, *model_ids: str) -> None:
        self.models = {id: ModelInfo(id, "abc123", 1_700_000_000, 10, "rookery") for id in model_ids}

    def list_models(self, *, limit: int, after: str | None = None, query: str | None = None) -> Page[ModelInfo]:
        found = [info for info in self.models.values() if (query or "") in info.model_id]
        return page(found, [info.model_id for info in found], limit, after)

    def get_model(self, model_id: str) -> ModelInfo:
        if model_id not in self.models:
            raise ModelNotFound("There is no such model.", param="model")
        return self.models[model_id]

    def delete_model(self, model_id: str) -> str:
        spelled = next((known for known in self.models if known.lower() == model_id.lower()), model_id)
        self.get_model(spelled)
        if spelled == "fledgling":
            raise Conflict("The embedded base model cannot be deleted.")
        del self.models[spelled]
        return spelled

    def read_card(self, model_id: str) -> str:
        return f"# {self.get_model(model_id).model_id}"


class MemoryFiles:
    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.records: dict[str, FileRecord] = {}

    def create_file(self, source: Path, filename: str, purpose: str) -> FileRecord:
        id = f"file-{len(self.records)}"
        path = source.rename(self.folder / id)
        self.records[id] = FileRecord(id, filename, path.stat().st_size, 1_700_000_000, purpose, path)
        return self.records[id]

    def get_file(self, file_id: str) -> FileRecord:
        if file_id not in self.records:
            raise NotFound("There is no such file.")
        return self.records[file_id]

    def list_files(
        self, *, limit: int, after: str | None = None, purpose: str | None = None, newest_first: bool = True
    ) -> Page[FileRecord]:
        found = [record for record in self.records.values() if purpose in (None, record.purpose)]
        found = found[::-1] if newest_first else found
        return page(found, [record.id for record in found], limit, after)

    def delete_file(self, file_id: str) -> None:
        self.get_file(file_id).path.unlink()
        del self.records[file_id]


class MemoryJobs:
    """A handle called `short` has too little text to learn from."""

    def __init__(self, files: MemoryFiles) -> None:
        self.files = files
        self.jobs: dict[str, Job] = {}

    def create_job(self, request: JobRequest) -> Job:
        for file in request.files:
            self.files.get_file(file.file_id)
            if file.handle == "short":
                raise TooFewTweets("@short has 3 tweets; at least 20 are needed.", param="training_file")
        id = f"ftjob-{len(self.jobs)}"
        self.jobs[id] = Job(id, request, JobStatus.QUEUED, 1_700_000_000, request.seed or 0)
        return self.jobs[id]

    def get_job(self, job_id: str) -> Job:
        if job_id not in self.jobs:
            raise NotFound("There is no such job.")
        return self.jobs[job_id]

    def list_jobs(
        self, *, limit: int, after: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> Page[Job]:
        found = [job for job in self.jobs.values() if (metadata or {}).items() <= job.request.metadata.items()][::-1]
        return page(found, [job.id for job in found], limit, after)

    def cancel_job(self, job_id: str) -> Job:
        if self.get_job(job_id).status.is_final:
            raise Conflict(f"Job {job_id} has already ended.")
        self.jobs[job_id] = dataclasses.replace(
            self.jobs[job_id], status=JobStatus.CANCELLED, finished_at=1_700_000_001
        )
        return self.jobs[job_id]

    def list_events(self, job_id: str, *, limit: int, after: str | None = None) -> Page[JobEvent]:
        self.get_job(job_id)
        events = [
            JobEvent(f"ftevent-{i}", job_id, 1_700_000_000 + i, "info", f"Step {i}", "metrics", {"step": i})
            for i in reversed(range(3))
        ]
        return page(events, [event.id for event in events], limit, after)
