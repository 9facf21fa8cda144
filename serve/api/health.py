"""Is the process alive, can it really write text, how is it doing, what is in memory, and what has it counted."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from serve.api.described import answers
from serve.api.overview import ServiceStatus, is_ready, service_status
from serve.api.service import Service
from serve.api.status import json_reply
from serve.errors import RookeryError, StoreUnavailable
from serve.exposition import render
from serve.types import Eviction, ReplicaView, Resident, Scope
from serve.version import VERSION


def router(service: Service) -> APIRouter:
    """/healthz, /readyz, /health, /metrics, /v1/status, /v1/replicas and /v1/residents."""
    routes = APIRouter()
    access = service.access

    @routes.get("/healthz")
    async def is_alive() -> Response:
        return json_reply({"status": "ok"})

    @routes.get("/readyz")
    @routes.get("/health")  # text-generation-inference's name for it
    async def check_ready() -> Response:
        try:
            await service.readiness.wait()
        except RookeryError as exc:
            raise StoreUnavailable(f"Not ready: {exc.message}", retry_after_s=exc.retry_after_s or 2) from exc
        return json_reply({"status": "ready"})

    @routes.get("/metrics", responses=answers("text/plain"), dependencies=access.needs(Scope.ADMIN))
    async def read_metrics(request: Request) -> Response:
        text, kind = await asyncio.to_thread(render, service.metrics, request.headers.get("accept", ""))
        return Response(text, headers={"content-type": kind})

    @routes.get("/v1/residents", dependencies=access.needs(Scope.ADMIN))
    async def list_residents() -> Response:
        replicas = await service.generator.replicas()
        residents = [resident for replica in replicas for resident in replica.residents]
        return json_reply({"object": "list", "data": [_resident_json(one) for one in residents]})

    @routes.get("/v1/replicas", dependencies=access.needs(Scope.ADMIN))
    async def list_replicas() -> Response:
        replicas = await service.generator.replicas()
        return json_reply({"object": "list", "data": [_replica_json(one) for one in replicas]})

    @routes.get("/v1/status", dependencies=access.needs(Scope.READ))
    async def show_status(request: Request) -> Response:
        if not access.caller(request).is_admin:
            return json_reply({"version": VERSION, "ready": await is_ready(service)})
        return json_reply(_status_json(await service_status(service)))

    return routes


def _status_json(status: ServiceStatus) -> dict[str, Any]:
    return {
        "version": status.version,
        "base_model": status.base_model,
        "ready": status.is_ready,
        "replicas": None if status.replicas is None else len(status.replicas),
        "resident_models": status.num_resident_models,
        "used_bytes": status.used_bytes,
        "budget_bytes": status.budget_bytes,
        "queued": status.num_queued,
        "running": status.num_running,
        "jobs": status.jobs,
        "models": status.num_models,
        "hub": {"enabled": status.is_hub_enabled},
    }


def _replica_json(replica: ReplicaView) -> dict[str, Any]:
    return {
        "replica": replica.name,
        "device": replica.device,
        "dtype": replica.dtype,
        "used_bytes": replica.used_bytes,
        "budget_bytes": replica.budget_bytes,
        "waiting": replica.num_waiting,
        "queued": replica.num_queued,
        "running": replica.num_running,
        "up_s": round(replica.up_s, 3),
        "residents": [_resident_json(one) for one in replica.residents],
        "evictions": [_eviction_json(one) for one in replica.evictions],
    }


def _eviction_json(eviction: Eviction) -> dict[str, Any]:
    return {
        "model": eviction.model_id,
        "revision": eviction.revision,
        "reason": eviction.reason,
        "bytes": eviction.num_bytes,
        "ago_s": round(eviction.ago_s, 3),
    }


def _resident_json(resident: Resident) -> dict[str, Any]:
    return {
        "model": resident.model_id,
        "revision": resident.revision,
        "tier": resident.tier,
        "bytes": resident.num_bytes,
        "leases": resident.leases,
        "idle_s": round(resident.idle_s, 3),
        "replica": resident.replica,
    }
