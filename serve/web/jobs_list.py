"""The caller's training jobs, the newest first."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import quote

import anyio.to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from serve.api.service import Service
from serve.types import Job, JobStatus, Page, Scope
from serve.web.pages import Pages, page_route

PAGE_SIZE = 50


@dataclass(frozen=True, slots=True)
class JobLine:
    """One job in a table."""

    job: Job

    @property
    def url(self) -> str:
        return f"/jobs/{quote(self.job.id)}"

    @property
    def title(self) -> str:
        """ "@ada & @bob": whose posts it learns from, as far as the caller or the archives say."""
        asked = [file.handle for file in self.job.request.files if file.handle]
        handles = list(self.job.result.get("counts") or asked)
        return " & ".join(f"@{handle}" for handle in handles) or self.job.request.suffix or self.job.id

    @property
    def kind(self) -> str:
        """The class of a tag."""
        kinds = {JobStatus.SUCCEEDED: "good", JobStatus.FAILED: "bad", JobStatus.PAUSED: "warn"}
        return kinds.get(self.job.status, "")

    @property
    def took_s(self) -> float | None:
        """From its start to its end, or to now."""
        if self.job.started_at is None:
            return None
        return (self.job.finished_at or time.time()) - self.job.started_at


def router(service: Service, pages: Pages) -> APIRouter:
    """/jobs"""
    routes = APIRouter(
        route_class=page_route(pages),
        include_in_schema=False,
        dependencies=service.access.needs(Scope.READ, with_key=True),
    )

    @routes.get("/jobs")
    async def show_jobs(request: Request, after: Annotated[str | None, Query(max_length=100)] = None) -> Response:
        def read() -> Page[Job]:
            return service.jobs.list_jobs(limit=PAGE_SIZE, after=after, viewer=service.access.caller(request).viewer)

        page = await anyio.to_thread.run_sync(read)
        following = f"/jobs?after={quote(page.items[-1].id)}" if page.has_more else None
        lines = [JobLine(job) for job in page.items]
        return pages.render(request, "jobs_list.html", jobs=lines, is_first=after is None, following=following)

    return routes
