"""The nouns that cross borders between parts, and the protocols by which the parts meet.

Frozen dataclasses of plain values: they are pickled between Ray processes. Nothing here imports torch,
HTTP or another part of ours.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypedDict, TypeVar

from serve.errors import InvalidRequest, ModelNotFound

T = TypeVar("T")

# One part of an id: the Hub's own rule (huggingface_hub.utils.validate_repo_id), which X handles satisfy:
# they may begin and end with '_', and the Hub's word boundary counts '_' as a letter.
_ID_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}", re.ASCII)
_IS_NO_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EACCES})
_IDEMPOTENCY_KEY = re.compile(r"[!-~](?:[ -~]{0,253}[!-~])?")

MAX_CHOICES = 16  # of one prompt
MAX_ARCHIVES = 8  # that one job learns from
MAX_BATCH_SIZE = 64  # of training
PREVIEW_PROMPT = "My dream is"  # how the first texts of a bot begin: huggingtweets' own

FinishReason = Literal["stop", "length", "stop_sequence"]
"""`stop`: the model ended the text itself; `length`: max_new_tokens; `stop_sequence`: a stop string."""

Tier = Literal["device", "host", "disk", "hub"]
"""Where a model's weights were when the request came. `device`: already in a slot."""


@dataclass(frozen=True, slots=True)
class ModelId:
    """`[namespace/]name[@revision]`; `str()` gives the canonical form without the revision.

    Ids that never become a path unchecked: each part is ASCII, starts with a letter, digit or '_', has no
    `..` or `--`, does not end in `.` or `-`, and does not end with `.git` (Source: validate_repo_id). No namespace is
    `_`: the store keeps models without one there.
    """

    namespace: str | None
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name

    @classmethod
    def parse(cls, text: str) -> ModelId:
        """Raises: ModelNotFound when `text` cannot be the id of any model."""
        path, _, revision = text.partition("@")
        parts = path.split("/")
        checked = parts + ([revision] if revision else [])
        is_misplaced = len(parts) > 2 or parts[:-1] == ["_"] or ("@" in text and not revision)
        if is_misplaced or len(text) > 256 or not all(map(_is_id_part, checked)):
            raise ModelNotFound(
                "There is no model of that name: a model id looks like 'huggingtweets/handle' or 'gpt2', in ASCII "
                "letters, digits, '.', '_' and '-'.",
                param="model",
            )
        return cls(parts[0] if len(parts) == 2 else None, parts[-1], revision or None)


def _is_id_part(part: str) -> bool:
    return bool(_ID_PART.fullmatch(part)) and not (
        ".." in part or "--" in part or part.endswith((".", "-")) or part.lower().endswith(".git")
    )


# --- Generation -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen; every field applies to one sequence, whatever else is in its batch.

    Order of effect: logit_bias, repetition / presence / frequency penalty, min_new_tokens, temperature,
    top_k, top_p, min_p, typical_p: transformers' own order. A neutral value switches a step off.
    """

    temperature: float = 1.0  # 0: greedy, and every filter below is without effect
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens seen, prompt included
    presence_penalty: float = 0.0  # subtracted once from tokens generated so far
    frequency_penalty: float = 0.0  # subtracted per occurrence from tokens generated so far
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    max_new_tokens: int = 128
    min_new_tokens: int = 0  # the end-of-text token is not sampled before
    stop: tuple[str, ...] = ()  # generation ends before the first of these; it is not part of the text
    ignore_eos: bool = False


class SamplingOverrides(TypedDict, total=False):
    """What a request said itself; all else comes from the model's own generation_config.json."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    max_new_tokens: int
    min_new_tokens: int
    stop: tuple[str, ...]
    ignore_eos: bool


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """`num_choices` continuations of each prompt by one model. Sequence index = prompt * num_choices + choice."""

    model_id: str
    prompts: tuple[str | tuple[int, ...], ...]  # text, or token ids; "" means <|endoftext|> alone
    sampling: SamplingOverrides = field(default_factory=SamplingOverrides)
    num_choices: int = 1
    seed: int = 0  # 64 bits; the same (seed, prompt, choice) gives the same text
    top_logprobs: int = 0  # how many alternatives to report at each position
    prompt_logprobs: bool = False  # also report the prompt's own tokens (`echo` with `logprobs`, HF `prefill`)
    truncate: int | None = None  # keep only this many last prompt tokens (HF `truncate`)
    add_bos: bool = False  # put <|endoftext|> before text prompts: the start of a tweet
    is_whole: bool = False  # nobody reads along: what follows the first delta may wait for the end
    request_id: str = ""
    sees_private: bool = True  # may be answered by a private model; else there is none of that name
    caller: str = ""  # who shares the engine fairly with others: a hash of the API key, never the key


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One token with its natural-log probability under the model (before temperature and filters)."""

    id: int
    text: str  # may hold U+FFFD where the token is a part of a character
    logprob: float | None  # None for the first prompt token, which nothing precedes
    special: bool = False
    top: tuple[tuple[int, str, float], ...] = ()  # (id, text, logprob), best first


@dataclass(frozen=True, slots=True)
class PromptInfo:
    """Sent with the first delta of a sequence."""

    text: str  # the prompt as the model saw it, decoded
    num_tokens: int
    tier: Tier
    queue_s: float  # from arrival to the first step, loading included
    load_s: float  # waiting for the weights; 0 when resident
    tokens: tuple[TokenInfo, ...] = ()  # only with prompt_logprobs
    revision: str = ""  # of the model that answers; "" where it is not known


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new in one sequence since its last delta.

    `text` never ends inside a character and never holds the beginning of a stop string, so it may be
    empty or lag behind `tokens`. The last delta has a `finish_reason`, or an `error` for this sequence alone.
    """

    index: int
    text: str
    tokens: tuple[TokenInfo, ...] = ()
    finish_reason: FinishReason | None = None
    prompt: PromptInfo | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Resident:
    """One model in memory, as `rookery ps` shows it."""

    model_id: str
    revision: str
    tier: Tier
    num_bytes: int
    leases: int
    idle_s: float
    replica: str = ""


class Generator(Protocol):
    """Whatever turns requests into text: the engine in this process, or a Ray Serve handle to it."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        """Coalesced deltas of all sequences. Closing the iterator cancels what is left.

        Raises: ModelNotFound, ModelUnusable, InvalidRequest, Overloaded, ... before the first delta.
        """
        ...

    async def residents(self) -> list[Resident]: ...

    async def forget(self, model_id: str) -> None:
        """Drop a deleted model from memory; sequences under way finish."""
        ...

    async def check_ready(self) -> None:
        """Really generates a token with the base model. Raises: RookeryError when it cannot."""
        ...


# --- Store ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model as the catalogue lists it. `created_at` is Unix seconds of its newest revision."""

    model_id: str
    revision: str
    created_at: int
    num_bytes: int
    owned_by: str
    base_model: str | None = None
    handles: tuple[str, ...] = ()
    num_parameters: int | None = None
    context_length: int | None = None
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # handle -> downloaded, retweets, short, kept
    tags: tuple[str, ...] = ()
    is_private: bool = False  # only for callers with a key
    from_hub: bool = False  # fetched from a Hub, and can be again


@dataclass(frozen=True, slots=True)
class RepoFile:
    """One file of a revision, as a Hub serves it. The digests are "" where nobody asked for them."""

    name: str  # relative, with "/"
    num_bytes: int
    location: Path
    sha256: str = ""  # of what the Hub would keep by Git LFS; "" of all else, which goes by its blob id
    blob_id: str = ""  # git's: sha1 over "blob <size>\0" and what git holds, the content or the pointer to it

    @property
    def lfs_pointer(self) -> bytes:
        """What git holds of a file with a `sha256`. Source: the Git LFS specification, version 1."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.num_bytes}\n".encode()

    def open(self) -> int:
        """A descriptor to read it by. Raises: FileNotFoundError, also for what is a link or no plain file by now."""
        try:
            descriptor = os.open(self.location, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as exc:
            if exc.errno in _IS_NO_FILE:
                raise FileNotFoundError(self.name) from exc
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise FileNotFoundError(self.name)
        return descriptor


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """`items` in order; `has_more` tells whether a further page follows the last one."""

    items: tuple[T, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class RevisionInfo:
    """One version of a model. `step`: of a checkpoint, which no alias ever named; None for a finished model."""

    model_id: str
    revision: str
    created_at: int  # Unix seconds
    num_bytes: int
    is_main: bool
    job_id: str | None = None
    step: int | None = None
    losses: Mapping[str, float] = field(default_factory=dict)


class Catalogue(Protocol):
    """Which models exist here. Methods block on disk: call them from a thread."""

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
        with_private: bool = True,
    ) -> Page[ModelInfo]:
        """By id, or the newest first. `query`: a part of the id, in any case; `owner`: the namespace, in any case.

        `tags`: all of them. A page follows the one before by what that one's last model said: its id is `after` in the
        order of ids, its (created_at, id) is `older_than` in the other. Neither need be here any more. Costs the same
        however many models there are.
        """
        ...

    def get_model(self, model_id: str) -> ModelInfo:
        """Raises: ModelNotFound."""
        ...

    def delete_model(self, model_id: str) -> str:
        """The id as it was spelled here. Raises: ModelNotFound; Conflict for the embedded base."""
        ...

    def read_card(self, model_id: str) -> str:
        """The README.md of the newest revision. Raises: ModelNotFound."""
        ...

    def find_picture(self, model_id: str) -> Path:
        """The file of its preview picture, a PNG. Raises: ModelNotFound when it has none."""
        ...

    def list_revisions(self, model_id: str) -> tuple[RevisionInfo, ...]:
        """Newest first. Raises: ModelNotFound."""
        ...

    def roll_back(self, model_id: str, revision: str) -> RevisionInfo:
        """Makes `main` name a revision that is here. Raises: ModelNotFound; Conflict for a checkpoint or the base."""
        ...

    def list_aliases(self, model_id: str) -> Mapping[str, str]:
        """Name -> revision, `main` among them. Raises: ModelNotFound."""
        ...

    def set_private(self, model_id: str, is_private: bool) -> None:
        """All revisions of the model. Raises: ModelNotFound; Conflict for the embedded base."""
        ...

    def list_files(self, model_id: str, *, with_digests: bool = False) -> tuple[RepoFile, ...]:
        """Those of the revision that `model_id` names, by name. Raises: ModelNotFound."""
        ...

    def find_file(self, model_id: str, name: str) -> RepoFile:
        """With its digests: of a large file they are computed once. Raises: ModelNotFound, NotFound."""
        ...


@dataclass(frozen=True, slots=True)
class PullProgress:
    """How far the fetch of a model from the Hub is. `file` is "" before the first."""

    phase: Literal["resolving", "waiting", "downloading", "converting", "publishing"]
    file: str = ""
    num_bytes: int = 0  # of all files of the model that are here
    total_bytes: int = 0  # 0: not known yet


class Puller(Protocol):
    """Fetches from the Hub what may or may not be here already. Blocks: call it from a thread."""

    def pull(self, model_id: str, on_progress: Callable[[PullProgress], None] = ...) -> ModelInfo:
        """The Hub's present revision, which then stays here until it is deleted.

        Raises: ModelNotFound, ModelGated, ModelUnusable, StoreUnavailable.
        """
        ...


# --- Training ---------------------------------------------------------------------------------------------


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
    is, a hash of the API key, never the key.
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


class Files(Protocol):
    """Uploaded files. Methods block: call them from a thread."""

    def create_file(self, source: Path, filename: str, purpose: str) -> FileRecord:
        """Takes `source` over (moves it). Raises: StoreUnavailable."""
        ...

    def get_file(self, file_id: str) -> FileRecord:
        """Raises: NotFound."""
        ...

    def list_files(
        self, *, limit: int, after: str | None = None, purpose: str | None = None, newest_first: bool = True
    ) -> Page[FileRecord]: ...

    def delete_file(self, file_id: str) -> None:
        """Raises: NotFound."""
        ...


class Jobs(Protocol):
    """Training jobs. Methods block: call them from a thread."""

    def create_job(self, request: JobRequest, *, idempotency_key: str | None = None) -> Job:
        """Checks the files first. The same key with the same request gives the same job, created once.

        Raises: NotFound, BadUpload, TooFewTweets, InvalidRequest; Conflict for the key with another request;
        Overloaded for more open jobs than a caller may have.
        """
        ...

    def get_job(self, job_id: str) -> Job:
        """Raises: NotFound."""
        ...

    def list_jobs(
        self, *, limit: int, after: str | None = None, metadata: Mapping[str, str] | None = None
    ) -> Page[Job]:
        """Newest first; only those that carry all of `metadata`, or, for {}, those that carry none."""
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


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises: InvalidRequest naming the field, the value and the limits (NaN is outside every range)."""
    if not low <= value <= high:
        raise InvalidRequest(f"'{name}' must be between {low:g} and {high:g}, not {value:g}.", param=name)


def check_idempotency_key(key: str) -> str:
    """A key that arrives in an HTTP header as it was sent. Raises: InvalidRequest."""
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidRequest(
            "An Idempotency-Key must be 1 to 255 printable ASCII characters, with no space at either end, such as a "
            "random UUID.",
            param="idempotency-key",
        )
    return key


def as_tuple(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """None -> (), "a" -> ("a",), ["a", "b"] -> ("a", "b")."""
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)
