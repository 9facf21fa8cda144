"""The operator's pages: what each replica holds and does, what has left memory and why, what waits, who asks most."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from serve.api.overview import service_status, unless_away
from serve.api.service import Service
from serve.types import Eviction, ReplicaView, Resident, Scope
from serve.web.jobs_list import JobLine
from serve.web.pages import Pages, page_route, wants_page

_NUM_JOBS = 10
_NUM_RESIDENTS = 100  # a replica may hold hundreds; GET /v1/replicas tells all
_NUM_EVICTIONS = 50
_NUM_TOP = 20


def router(service: Service, pages: Pages) -> APIRouter:
    """/admin and /admin/top"""
    routes = APIRouter(
        route_class=page_route(pages), include_in_schema=False, dependencies=service.access.needs(Scope.ADMIN)
    )

    @routes.get("/admin")
    async def show_operator(request: Request) -> Response:
        latest = asyncio.to_thread(service.jobs.list_jobs, limit=_NUM_JOBS)
        whole, jobs = await asyncio.gather(service_status(service), unless_away(latest))
        replicas = whole.replicas or ()
        residents = by_last_use(replicas)
        return pages.render(
            request,
            "operator.html",
            whole=whole,
            jobs=None if jobs is None else [JobLine(job) for job in jobs.items],
            residents=residents[:_NUM_RESIDENTS],
            num_more=max(0, len(residents) - _NUM_RESIDENTS),
            evictions=newest_evictions(replicas)[:_NUM_EVICTIONS],
            num_waiting=sum(one.num_waiting for one in replicas),
            age=age,
        )

    @routes.get("/admin/top")
    async def show_top(request: Request) -> Response:
        if not wants_page(request):
            return RedirectResponse(f"/v1/top?limit={_NUM_TOP}", 303)
        return pages.render(request, "top.html", top=await service.generator.top(_NUM_TOP), age=age)

    return routes


def by_last_use(replicas: Sequence[ReplicaView]) -> list[Resident]:
    """Of all replicas: those in use, then the others, the last used first. Each names its replica."""
    found = [replace(resident, replica=one.name) for one in replicas for resident in one.residents]
    return sorted(found, key=lambda resident: (-resident.leases, resident.idle_s, resident.model_id))


def newest_evictions(replicas: Sequence[ReplicaView]) -> list[tuple[str, Eviction]]:
    """Of all replicas, each with the name of its own."""
    found = [(one.name, eviction) for one in replicas for eviction in one.evictions]
    return sorted(found, key=lambda pair: pair[1].ago_s)


def age(seconds: float) -> str:
    """ "12 s", "3 min", "5 h", "2 days"."""
    for length, unit in ((2 * 86_400, "days"), (2 * 3_600, "h"), (2 * 60, "min")):
        if seconds >= length:
            return f"{seconds // (length / 2):.0f} {unit}"
    return f"{seconds:.0f} s"
