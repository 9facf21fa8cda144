"""Training: files, jobs and what is recorded of them, and the protocols of those who keep these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from serve.types.keys import ALL_SEEING, Viewer
from serve.types.models import Page, Visibility

MAX_ARCHIVES = 8  # that one job learns from
MAX_BATCH_SIZE = 64  # of training


class JobStatus(StrEnum):
    """The life of a fine-tuning job in OpenAI's words."""

    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)


TRAINING_PURPOSE = "fine-tune"
RESULTS_PURPOSE = "fine-tune-results"  # of the CSV of a job's metrics
BOT_PURPOSE = "bot"  # of files that came for one job, and are deleted when it ends
ABANDONED_AFTER_S = 24 * 3600  # for which no job came: they are deleted too

Priority = Literal[-1, 0, 1]
"""Of a job: jobs of a higher one go first; among equals, callers take turns."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """An uploaded file. The bytes are at `path`, under a name of ours; `filename` is the user's own."""

    id: str  # "file-..."
    filename: str
    num_bytes: int
    created_at: int
    purpose: str
    path: Path
    owner: str = ""  # the tenant whose it is


@dataclass(frozen=True, slots=True)
class TrainingFile:
    """One handle's archive in a job; `handle` None: as the archive itself says."""

    file_id: str
    handle: str | None = None


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """`None`: huggingtweets' own value (4 epochs, batch 1, 1.372e-4, the last times what the base suggests)."""

    n_epochs: int | None = None
    batch_size: int | None = None
    learning_rate_multiplier: float | None = None


@dataclass(frozen=True, slots=True)
class Integration:
    """A tracker that is to be told of a job's runs. None: as the server is set up."""

    tracker: Literal["wandb", "trackio"]
    project: str | None = None
    entity: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What a caller asks for. `suffix` overrides the name after `huggingtweets/`.

    `validation_file`: the texts of this file are held out; None: a tenth of the training texts. `owner`: whose turn it
    is, a name of the API key, never the key. `viewer`: whose the job and its model are, and what it may use.
    """

    base_model: str
    files: tuple[TrainingFile, ...]
    hyperparameters: Hyperparameters = Hyperparameters()
    suffix: str | None = None
    seed: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    validation_file: str | None = None
    integrations: tuple[Integration, ...] = ()
    priority: Priority = 0
    owner: str = ""
    viewer: Viewer = ALL_SEEING
    visibility: Visibility = Visibility.PUBLIC  # of a new model; one that is here gets no less private


@dataclass(frozen=True, slots=True)
class Job:
    """One training job, as stored."""

    id: str  # "ftjob-..."
    request: JobRequest
    status: JobStatus
    created_at: int
    seed: int
    started_at: int | None = None
    finished_at: int | None = None
    estimated_finish: int | None = None
    fine_tuned_model: str | None = None
    trained_tokens: int | None = None
    error_code: str | None = None
    error_message: str | None = None
    error_param: str | None = None
    result: Mapping[str, Any] = field(default_factory=dict)  # counts, losses, samples, revision, result_files


@dataclass(frozen=True, slots=True)
class JobEvent:
    """A line of a job's history. `data` of a `metrics` event: step, train_loss, valid_loss, learning_rate, ..."""

    id: str  # "ftevent-..."
    job_id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"] = "message"
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A revision from the middle of a training, servable as `model_id`, which names it. `metrics`: as in events."""

    id: str  # "ftckpt-..."
    job_id: str
    created_at: int
    step: int
    model_id: str
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Artifact:
    """One version of what a run used or made. `digest` says what it holds; `type` is one of huggingtweets' four.

    raw-dataset `tweets-<handle>`, train-dataset `dataset-<handle>`, pretrained-model, finetuned-model `<handle>`.
    """

    type: Literal["raw-dataset", "train-dataset", "pretrained-model", "finetuned-model"]
    name: str
    digest: str
    version: int = 0  # 0 for the first content under this name, then 1, ...
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """`@<handle>-preprocess` or `@<handle>-train` of one job. `history`: column -> values, a step each.

    `tables`: name -> {"columns": [...], "data": [[...], ...]}, as trackers take them.
    """

    job_id: str
    job_type: Literal["preprocess", "train"]
    name: str
    started_at: int
    finished_at: int
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    history: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[Artifact, ...] = ()
    outputs: tuple[Artifact, ...] = ()


CheckRoom: TypeAlias = Callable[[int, int], None]
"""Raises where beside so many bytes of a tenant's files there is no room for so many more."""


class Files(Protocol):
    """Uploaded files. Methods block: call them from a thread."""

    def create_file(
        self, source: Path, filename: str, purpose: str, owner: str = "", *, check_room: CheckRoom | None = None
    ) -> FileRecord:
        """`stage_file` and `keep_files`, of one."""
        ...

    def stage_file(self, source: Path, filename: str, purpose: str, owner: str = "") -> FileRecord:
        """`source` where it lies, with the id that it will have once it is kept; no other call knows it yet."""
        ...

    def keep_files(
        self, staged: Sequence[FileRecord], *, check_room: CheckRoom | None = None
    ) -> tuple[FileRecord, ...]:
        """Takes them over (moves their bytes), all or none; they are one tenant's.

        Raises: StoreUnavailable, and what `check_room` raises.
        """
        ...

    def get_file(self, file_id: str, viewer: Viewer = ALL_SEEING) -> FileRecord:
        """Raises: NotFound, also for a file that is not the viewer's."""
        ...

    def list_files(
        self,
        *,
        limit: int,
        after: str | None = None,
        purpose: str | None = None,
        newest_first: bool = True,
        viewer: Viewer = ALL_SEEING,
    ) -> Page[FileRecord]: ...

    def bytes_of(self, owner: str) -> int:
        """Of all of a tenant's files."""
        ...

    def delete_file(self, file_id: str) -> None:
        """Raises: NotFound."""
        ...


class Jobs(Protocol):
    """Training jobs. Methods block: call them from a thread."""

    def create_job(
        self,
        request: JobRequest,
        *,
        idempotency_key: str | None = None,
        max_open: int | None = None,
        staged: Sequence[FileRecord] = (),
        check_room: CheckRoom | None = None,
    ) -> Job:
        """Checks the files first. The same key with the same request gives the same job, created once.

        `max_open`: how many of the owner's may not have ended; 0: any number, None: what is usual. `staged`: files of
        the request that are not kept yet; they are with a new job, as by `keep_files`, and are the caller's else.
        Raises: NotFound, BadUpload, TooFewTweets, InvalidRequest; Conflict for the key with another request;
        Overloaded for more open jobs than a caller may have.
        """
        ...

    def get_job(self, job_id: str, viewer: Viewer = ALL_SEEING) -> Job:
        """Raises: NotFound, also for a job that is not the viewer's."""
        ...

    def check_job(self, job_id: str, viewer: Viewer) -> None:
        """Raises: NotFound where there is no such job of the viewer's."""
        ...

    def list_jobs(
        self,
        *,
        limit: int,
        after: str | None = None,
        metadata: Mapping[str, str] | None = None,
        viewer: Viewer = ALL_SEEING,
    ) -> Page[Job]:
        """The viewer's, newest first; only those that carry all of `metadata`, or, for {}, those that carry none."""
        ...

    def count_jobs(self) -> Mapping[JobStatus, int]:
        """How many there are of each status that any is in."""
        ...

    def cancel_job(self, job_id: str) -> Job:
        """Raises: NotFound; Conflict when it has already ended."""
        ...

    def pause_job(self, job_id: str) -> Job:
        """A waiting job pauses at once, a running one after its next step, with a checkpoint. Raises: as cancel_job."""
        ...

    def resume_job(self, job_id: str) -> Job:
        """Raises: NotFound; Conflict when it is not paused."""
        ...

    def list_events(self, job_id: str, *, limit: int, after: str | None = None) -> Page[JobEvent]:
        """Newest first. Raises: NotFound."""
        ...

    def list_checkpoints(self, job_id: str, *, limit: int, after: str | None = None) -> Page[Checkpoint]:
        """Newest first. Raises: NotFound."""
        ...

    def list_runs(self, job_id: str) -> tuple[Run, ...]:
        """What is recorded of a job that has ended well; else nothing. Raises: NotFound."""
        ...

    def forget_model(self, model_id: str) -> None:
        """The model was deleted: its open jobs are cancelled, and what its jobs wrote of its texts is gone."""
        ...
