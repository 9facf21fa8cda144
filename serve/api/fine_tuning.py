"""OpenAI's fine-tuning jobs: create, look up, list, pause, resume, cancel; their events, checkpoints and runs.

It knows the shape of a job on the wire; what a job is, and who works on it, is decided by Jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from serve.api.body import read_json
from serve.api.described import takes
from serve.api.job_request import PRIORITIES, JobBody, from_body, read_idempotency_key, read_metadata_filter
from serve.api.lists import After, PathId, as_list, page_of
from serve.api.quota import allowance
from serve.api.service import Service
from serve.api.status import json_reply
from serve.api.storage import check_room
from serve.types import Artifact, Checkpoint, Integration, Job, JobEvent, Run, Scope

_Limit = Annotated[int, Query(ge=1, le=1000)]

_ORGANIZATION = "rookery"


def router(service: Service) -> APIRouter:
    """/v1/fine_tuning/jobs."""
    routes = APIRouter(prefix="/v1/fine_tuning/jobs")
    jobs, access = service.jobs, service.access
    reads, changes = access.needs(Scope.READ, with_key=True), access.needs(Scope.TRAIN)

    def check_own(request: Request, job_id: str) -> None:
        """Raises: NotFound for a job that is not the caller's."""
        jobs.check_job(job_id, access.caller(request).viewer)

    async def reply(act: Callable[[], Job]) -> Response:
        return json_reply(job_json(await anyio.to_thread.run_sync(act)))

    async def change(request: Request, job_id: str, act: Callable[[str], Job]) -> Response:
        def check_and_act() -> Job:
            check_own(request, job_id)
            return act(job_id)

        return await reply(check_and_act)

    @routes.post("", dependencies=changes, openapi_extra=takes(JobBody))
    async def create_job(request: Request) -> Response:
        key = read_idempotency_key(request)
        wanted = from_body(await read_json(request, JobBody, service), access.caller(request))
        await check_room(service, request)
        max_open = allowance(request).limits.jobs
        return await reply(partial(jobs.create_job, wanted, idempotency_key=key, max_open=max_open))

    @routes.get("", dependencies=reads)
    async def list_jobs(request: Request, limit: _Limit = 20, after: After = None) -> Response:
        metadata = read_metadata_filter(request)

        def read() -> dict[str, Any]:
            viewer = access.caller(request).viewer
            page = jobs.list_jobs(limit=limit, after=after, metadata=metadata, viewer=viewer)
            return as_list([job_json(job) for job in page.items], page.has_more)

        return json_reply(await anyio.to_thread.run_sync(read))

    @routes.get("/{job_id}", dependencies=reads)
    async def retrieve_job(request: Request, job_id: PathId) -> Response:
        return await reply(partial(jobs.get_job, job_id, access.caller(request).viewer))

    @routes.post("/{job_id}/cancel", dependencies=changes)
    async def cancel_job(request: Request, job_id: PathId) -> Response:
        return await change(request, job_id, jobs.cancel_job)

    @routes.post("/{job_id}/pause", dependencies=changes)
    async def pause_job(request: Request, job_id: PathId) -> Response:
        return await change(request, job_id, jobs.pause_job)

    @routes.post("/{job_id}/resume", dependencies=changes)
    async def resume_job(request: Request, job_id: PathId) -> Response:
        return await change(request, job_id, jobs.resume_job)

    @routes.get("/{job_id}/events", dependencies=reads)
    async def list_events(request: Request, job_id: PathId, limit: _Limit = 20, after: After = None) -> Response:
        def read() -> dict[str, Any]:
            check_own(request, job_id)
            page = jobs.list_events(job_id, limit=limit, after=after)
            return as_list([event_json(event) for event in page.items], page.has_more)

        return json_reply(await anyio.to_thread.run_sync(read))

    @routes.get("/{job_id}/checkpoints", dependencies=reads)
    async def list_checkpoints(request: Request, job_id: PathId, limit: _Limit = 10, after: After = None) -> Response:
        def read() -> dict[str, Any]:
            check_own(request, job_id)
            page = jobs.list_checkpoints(job_id, limit=limit, after=after)
            return as_list([checkpoint_json(checkpoint) for checkpoint in page.items], page.has_more)

        return json_reply(await anyio.to_thread.run_sync(read))

    @routes.get("/{job_id}/runs", dependencies=reads)
    async def list_runs(request: Request, job_id: PathId, limit: _Limit = 20, after: After = None) -> Response:
        def read() -> dict[str, Any]:
            check_own(request, job_id)
            runs = [run_json(run) for run in jobs.list_runs(job_id)]
            page = page_of(runs, [run["id"] for run in runs], limit, after)
            return as_list(page.items, page.has_more)

        return json_reply(await anyio.to_thread.run_sync(read))

    return routes


def job_json(job: Job) -> dict[str, Any]:
    """OpenAI's job object; `started_at`, `training_files`, `suffix`, `priority`, `visibility` and `result` are ours."""
    request = job.request
    hyperparameters = _hyperparameters_json(job)
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
        "organization_id": _ORGANIZATION,
        "result_files": list(job.result.get("result_files", ())),
        "status": job.status.value,
        "training_file": request.files[0].file_id if request.files else "",
        "training_files": [{"file_id": file.file_id, "handle": file.handle} for file in request.files],
        "validation_file": request.validation_file,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "seed": job.seed,
        "suffix": request.suffix,
        "priority": PRIORITIES[request.priority],
        "visibility": request.visibility.value,
        "trained_tokens": job.trained_tokens,
        "error": error,
        "integrations": [_integration_json(one) for one in request.integrations] or None,
        "metadata": dict(request.metadata) or None,
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
        "data": _metrics_json(event.data),
    }


def checkpoint_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """OpenAI's checkpoint object; `fine_tuned_model_checkpoint` can be asked for texts."""
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": checkpoint.model_id,
        "fine_tuning_job_id": checkpoint.job_id,
        "step_number": checkpoint.step,
        "metrics": _metrics_json({"step": checkpoint.step, **checkpoint.metrics}),
    }


def run_json(run: Run) -> dict[str, Any]:
    """One run with its lineage, as experiment trackers tell it."""
    return {
        "id": f"{run.job_id}/{run.job_type}",
        "object": "fine_tuning.job.run",
        "fine_tuning_job_id": run.job_id,
        "job_type": run.job_type,
        "name": run.name,
        "started_at": run.started_at,
        "finished_at": run.finished_at,
        "config": dict(run.config),
        "summary": dict(run.summary),
        "inputs": [_artifact_json(artifact) for artifact in run.inputs],
        "outputs": [_artifact_json(artifact) for artifact in run.outputs],
        "tables": dict(run.tables),
        "history": dict(run.history),
    }


def _artifact_json(artifact: Artifact) -> dict[str, Any]:
    return {
        "id": f"{artifact.name}:v{artifact.version}",
        "type": artifact.type,
        "name": artifact.name,
        "version": artifact.version,
        "digest": artifact.digest,
        "data": dict(artifact.data),
    }


def _metrics_json(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """With OpenAI's name for a loss over all that is held out, which ours always is."""
    whole = {"full_valid_loss": metrics["valid_loss"]} if metrics.get("valid_loss") is not None else {}
    return {**metrics, **whole}


def _hyperparameters_json(job: Job) -> dict[str, Any]:
    """As used, once the job knows what `auto` means; until then as asked for."""
    asked, used = job.request.hyperparameters, job.result.get("hyperparameters") or {}
    values = {
        "n_epochs": asked.n_epochs,
        "batch_size": asked.batch_size,
        "learning_rate_multiplier": asked.learning_rate_multiplier,
    }
    return {name: used.get(name, "auto") if value is None else value for name, value in values.items()}


def _integration_json(integration: Integration) -> dict[str, Any]:
    told = {
        "project": integration.project,
        "entity": integration.entity,
        "name": integration.name,
        "tags": list(integration.tags),
    }
    return {"type": integration.tracker, integration.tracker: told}
