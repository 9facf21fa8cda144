"""OpenAI's fine-tuning jobs, and the one call that turns archives into a bot.

It checks the form of a request; whether an archive can be learned from is decided by Jobs.
"""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from pydantic import Field, ValidationError
from starlette.responses import Response

from serve.api.body import Body, Form, expected, read_form, read_json
from serve.api.files import keep
from serve.api.generation import check_model_id
from serve.api.openai import as_list
from serve.api.service import Service
from serve.api.status import invalid, json_reply
from serve.errors import BadUpload, InvalidRequest, ModelNotFound, RookeryError
from serve.types import (
    BOT_PURPOSE,
    MAX_ARCHIVES,
    MAX_BATCH_SIZE,
    FileRecord,
    Hyperparameters,
    Job,
    JobEvent,
    JobRequest,
    ModelId,
    TrainingFile,
)

_Auto = Literal["auto"]
_Epochs = Annotated[int, Field(ge=1, le=50)]
_BatchSize = Annotated[int, Field(ge=1, le=MAX_BATCH_SIZE)]
_Multiplier = Annotated[float, Field(gt=0, le=100)]
_Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]  # OpenAI's bounds for training
_FileId = Annotated[str, Field(min_length=1, max_length=128)]
_Handle = Annotated[
    str,
    Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x20\x7f]+$"),
    expected("the name of an account, of 1 to 256 characters without spaces"),
]
_Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None,
    Field(max_length=16),
    expected("an object of at most 16 texts; keys up to 64 characters, values up to 512"),
]


class HyperparametersBody(Body):
    n_epochs: Annotated[_Epochs | _Auto | None, expected("'auto' or a whole number from 1 to 50")] = None
    batch_size: Annotated[
        _BatchSize | _Auto | None, expected(f"'auto' or a whole number from 1 to {MAX_BATCH_SIZE}")
    ] = None
    learning_rate_multiplier: Annotated[
        _Multiplier | _Auto | None, expected("'auto' or a number above 0, up to 100")
    ] = None


class SupervisedBody(Body):
    hyperparameters: HyperparametersBody | None = None


class MethodBody(Body):
    type: Literal["supervised"]
    supervised: SupervisedBody | None = None


class TrainingFileBody(Body):
    file_id: _FileId
    handle: _Handle | None = None


class JobBody(Body):
    """OpenAI's fields; `training_files` and `handle` are ours, for bots that learn from several archives."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    training_file: _FileId | None = None
    training_files: Annotated[list[TrainingFileBody], Field(min_length=1, max_length=MAX_ARCHIVES)] | None = None
    handle: _Handle | None = None
    validation_file: Any = None
    suffix: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    seed: _Seed | None = None
    hyperparameters: HyperparametersBody | None = None
    method: MethodBody | None = None
    integrations: list[Any] | None = None
    metadata: _Metadata = None


class BotForm(Body):
    """The small fields of POST /v1/bots: text, as forms have it."""

    base_model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    handle: Annotated[list[_Handle], expected("names of accounts, of 1 to 256 characters without spaces")]
    seed: Annotated[_Seed, Field(strict=False)] | None = None
    n_epochs: Annotated[_Epochs, Field(strict=False)] | None = None


def router(service: Service) -> APIRouter:
    """/v1/fine_tuning/jobs and /v1/bots."""
    routes = APIRouter(prefix="/v1")

    @routes.post("/fine_tuning/jobs")
    async def create_job(request: Request) -> Response:
        wanted = _to_request(await read_json(request, JobBody, service.limits))
        return json_reply(job_json(await anyio.to_thread.run_sync(service.jobs.create_job, wanted)))

    @routes.get("/fine_tuning/jobs")
    async def list_jobs(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=1000)] = 20,
        after: Annotated[str | None, Query(max_length=128)] = None,
    ) -> Response:
        metadata = _metadata_filter(request)

        def read() -> dict[str, Any]:
            page = service.jobs.list_jobs(limit=limit, after=after, metadata=metadata)
            return as_list([job_json(job) for job in page.items], page.has_more)

        return json_reply(await anyio.to_thread.run_sync(read))

    @routes.get("/fine_tuning/jobs/{job_id}")
    async def retrieve_job(job_id: str) -> Response:
        return json_reply(job_json(await anyio.to_thread.run_sync(service.jobs.get_job, job_id)))

    @routes.post("/fine_tuning/jobs/{job_id}/cancel")
    async def cancel_job(job_id: str) -> Response:
        return json_reply(job_json(await anyio.to_thread.run_sync(service.jobs.cancel_job, job_id)))

    @routes.get("/fine_tuning/jobs/{job_id}/events")
    async def list_events(
        job_id: str,
        limit: Annotated[int, Query(ge=1, le=1000)] = 20,
        after: Annotated[str | None, Query(max_length=128)] = None,
    ) -> Response:
        def read() -> dict[str, Any]:
            page = service.jobs.list_events(job_id, limit=limit, after=after)
            return as_list([event_json(event) for event in page.items], page.has_more)

        return json_reply(await anyio.to_thread.run_sync(read))

    @routes.get("/fine_tuning/jobs/{job_id}/checkpoints")
    async def list_checkpoints(job_id: str) -> Response:
        await anyio.to_thread.run_sync(service.jobs.get_job, job_id)
        return json_reply(as_list([], has_more=False))

    @routes.post("/bots")
    async def create_bot(request: Request) -> Response:
        """Archives in, a training job out."""
        async with read_form(request, service.upload_dir, service.limits) as form:
            wanted = _read_bot(form)
            kept: list[FileRecord] = []
            try:
                for part in form.files("archive"):
                    kept.append(await keep(service, part, BOT_PURPOSE))
                job = await anyio.to_thread.run_sync(service.jobs.create_job, _bot_request(wanted, kept, service))
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await _drop(service, kept)  # they came for this job alone
                raise
        return json_reply(job_json(job), 201)

    return routes


def job_json(job: Job) -> dict[str, Any]:
    """OpenAI's job object; `training_files` and `result` are ours."""
    request = job.request
    hyperparameters = _hyperparameters_json(request.hyperparameters)
    error = None
    if job.error_code is not None:
        error = {"code": job.error_code, "message": job.error_message or "", "param": job.error_param}
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "estimated_finish": job.estimated_finish,
        "model": request.base_model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": "rookery",
        "result_files": [],
        "status": job.status.value,
        "training_file": request.files[0].file_id if request.files else "",
        "training_files": [{"file_id": file.file_id, "handle": file.handle} for file in request.files],
        "validation_file": None,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "seed": job.seed,
        "suffix": request.suffix,
        "trained_tokens": job.trained_tokens,
        "error": error,
        "integrations": None,
        "metadata": dict(request.metadata),
        "result": dict(job.result),
    }


def event_json(event: JobEvent) -> dict[str, Any]:
    """OpenAI's event object."""
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": dict(event.data),
    }


def _hyperparameters_json(chosen: Hyperparameters) -> dict[str, Any]:
    values = {
        "n_epochs": chosen.n_epochs,
        "batch_size": chosen.batch_size,
        "learning_rate_multiplier": chosen.learning_rate_multiplier,
    }
    return {name: "auto" if value is None else value for name, value in values.items()}


def _to_request(body: JobBody) -> JobRequest:
    if body.validation_file is not None:
        raise InvalidRequest("'validation_file' is not supported; leave it out.", param="validation_file")
    if body.integrations:
        raise InvalidRequest("'integrations' are not supported; leave them out.", param="integrations")
    supervised = body.method.supervised if body.method else None
    chosen = (supervised.hyperparameters if supervised else None) or body.hyperparameters or HyperparametersBody()
    return JobRequest(
        base_model=check_model_id(body.model),
        files=_training_files(body),
        hyperparameters=Hyperparameters(
            None if chosen.n_epochs == "auto" else chosen.n_epochs,
            None if chosen.batch_size == "auto" else chosen.batch_size,
            None if chosen.learning_rate_multiplier == "auto" else chosen.learning_rate_multiplier,
        ),
        suffix=_check_suffix(body.suffix),
        seed=body.seed,
        metadata=body.metadata or {},
    )


def _training_files(body: JobBody) -> tuple[TrainingFile, ...]:
    if body.training_file is not None and body.training_files is not None:
        raise InvalidRequest("Give 'training_file' or 'training_files', not both.", param="training_files")
    if body.training_files is not None:
        return tuple(TrainingFile(file.file_id, _bare(file.handle)) for file in body.training_files)
    if body.training_file is None:
        raise InvalidRequest("'training_file' is missing: the id of an uploaded archive.", param="training_file")
    handle = body.handle or (body.metadata or {}).get("handle") or None
    return (TrainingFile(body.training_file, _bare(handle)),)


def _bare(handle: str | None) -> str | None:
    return handle.strip().removeprefix("@") or None if handle is not None else None


def _check_suffix(suffix: str | None) -> str | None:
    if suffix is not None:
        try:
            ModelId.parse(f"huggingtweets/{suffix}")
        except ModelNotFound as exc:
            raise InvalidRequest(
                "'suffix' names the new model: ASCII letters, digits, '.', '_' and '-', starting with a letter or "
                "digit, without '..' or '--'.",
                param="suffix",
            ) from exc
    return suffix


def _metadata_filter(request: Request) -> dict[str, str] | None:
    found = {
        key.removeprefix("metadata[").removesuffix("]"): value
        for key, value in request.query_params.multi_items()
        if key.startswith("metadata[") and key.endswith("]")
    }
    if len(found) > 16 or any(len(key) > 64 or len(value) > 512 for key, value in found.items()):
        raise InvalidRequest("'metadata' filters: at most 16; keys up to 64 characters, values 512.", param="metadata")
    return found or None


def _read_bot(form: Form) -> BotForm:
    num_archives, handles = len(form.files("archive")), form.values("handle")
    if not 1 <= num_archives <= MAX_ARCHIVES:
        raise BadUpload(f"Send 1 to {MAX_ARCHIVES} parts named 'archive', not {num_archives}.", param="archive")
    if len(handles) > num_archives:
        raise BadUpload(
            f"There are {len(handles)} 'handle' fields for {num_archives} archives; send one for each, in order.",
            param="handle",
        )
    given = {name: form.value(name) for name in ("base_model", "seed", "n_epochs")}
    try:
        return BotForm.model_validate({**given, "handle": handles})
    except ValidationError as exc:
        raise invalid(exc) from exc


def _bot_request(wanted: BotForm, kept: list[FileRecord], service: Service) -> JobRequest:
    handles = [_bare(handle) for handle in wanted.handle] + [None] * (len(kept) - len(wanted.handle))
    return JobRequest(
        base_model=check_model_id(wanted.base_model or service.default_base),
        files=tuple(TrainingFile(record.id, handle) for record, handle in zip(kept, handles, strict=True)),
        hyperparameters=Hyperparameters(n_epochs=wanted.n_epochs),
        seed=wanted.seed,
    )


async def _drop(service: Service, records: list[FileRecord]) -> None:
    for record in records:
        with contextlib.suppress(RookeryError):
            await anyio.to_thread.run_sync(service.files.delete_file, record.id)
