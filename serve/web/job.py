"""A job's page: what it is doing in words, how far it is, how well it learns, and what it writes meanwhile.

Everything is read from the job and its events. Knows nobody who works on jobs.
"""

from __future__ import annotations

import contextlib
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import quote

import anyio.to_thread
from fastapi import APIRouter, Request
from markupsafe import Markup
from starlette.responses import Response

from serve.api.body import read_fields
from serve.api.lists import PathId
from serve.api.service import Service
from serve.errors import Conflict, InvalidRequest, ModelNotFound
from serve.types import PREVIEW_PROMPT, Job, JobEvent, Jobs, JobStatus, Scope
from serve.web import charts
from serve.web.jobs_list import JobLine
from serve.web.pages import Pages, go, page_route
from serve.web.recent import Recent

LIVE_MS = 2000
_PAGE_SIZE = 1000  # events read at once
_FEW = 100  # more than come between two looks
_MAX_LOGS = 64
_MAX_MESSAGES = 50
_NUM_SETS = 6  # of samples, unfolded


def router(service: Service, pages: Pages) -> APIRouter:
    """/jobs/{id}"""
    routes = APIRouter(route_class=page_route(pages), include_in_schema=False)
    jobs, logs, access = service.jobs, Logs(service.jobs), service.access
    acts: Mapping[str, Callable[[str], Job]] = {
        "pause": jobs.pause_job,
        "resume": jobs.resume_job,
        "cancel": jobs.cancel_job,
    }

    @routes.get("/jobs/{job_id}", dependencies=access.needs(Scope.READ, with_key=True))
    async def show_job(request: Request, job_id: PathId) -> Response:
        def show() -> Response:
            caller = access.caller(request)
            job = jobs.get_job(job_id, caller.viewer)
            log = logs.read(job)
            history = _history(jobs, job) if job.status is JobStatus.SUCCEEDED else {}
            counts = jobs.count_jobs() if job.status in _WAITING and caller.is_admin else None
            view = JobView(job, log, counts, history, _has_bot(service, job, request))
            return pages.render(
                *(request, "job.html"), job=view, live_ms=LIVE_MS, prompt=PREVIEW_PROMPT, num_sets=_NUM_SETS
            )

        return await anyio.to_thread.run_sync(show)  # drawing a long job takes as much as reading it

    @routes.post("/jobs/{job_id}", dependencies=access.needs(Scope.TRAIN))
    async def change_job(request: Request, job_id: PathId) -> Response:
        do = (await read_fields(request, service)).get("do", [""])[-1]
        if do not in acts:
            raise InvalidRequest("'do' must be 'pause', 'resume' or 'cancel'.", param="do")
        await anyio.to_thread.run_sync(jobs.check_job, job_id, access.caller(request).viewer)
        with contextlib.suppress(Conflict):  # it was quicker: its page says how it ended
            await anyio.to_thread.run_sync(acts[do], job_id)
        return go(f"/jobs/{quote(job_id)}")

    return routes


_WAITING = (JobStatus.VALIDATING, JobStatus.QUEUED)


# --- What a job has told ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Point:
    """One event of type metrics."""

    step: int
    total: int
    train: float | None
    valid: float | None


@dataclass(frozen=True, slots=True)
class Log:
    """All events of a job until `newest_id`; texts by the step after which they were written."""

    newest_id: str | None = None
    points: tuple[Point, ...] = ()
    samples: tuple[tuple[Point, tuple[str, ...]], ...] = ()
    messages: tuple[JobEvent, ...] = ()

    def plus(self, events: Sequence[JobEvent]) -> Log:
        """`events`: those that came after, oldest first."""
        if not events:
            return self
        told = [(_point(event.data), event) for event in events if event.type == "metrics" and "step" in event.data]
        samples = [(point, tuple(event.data["samples"])) for point, event in told if event.data.get("samples")]
        return Log(
            events[-1].id,
            self.points + tuple(point for point, _ in told),
            self.samples + tuple(samples),
            (self.messages + tuple(event for event in events if event.type == "message"))[-_MAX_MESSAGES:],
        )


class Logs:
    """The events of jobs, of which only new ones are read again while a job goes on.

    Of one that has ended nothing is remembered: what its model wrote may be erased at any time.
    """

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._known: Recent[str, Log] = Recent(_MAX_LOGS)

    def read(self, job: Job) -> Log:
        """Blocks. Raises: NotFound."""
        if job.status.is_final:
            self._known.forget(lambda job_id: job_id == job.id)
            return self._plus_new(job.id, Log())
        log = self._plus_new(job.id, self._known.get(job.id) or Log())
        self._known.put(job.id, log)  # somebody else's newer one may go: then its end is read once more
        return log

    def _plus_new(self, job_id: str, known: Log) -> Log:
        newest_first: list[JobEvent] = []
        limit = _PAGE_SIZE if known.newest_id is None else _FEW
        while True:
            after = newest_first[-1].id if newest_first else None
            page = self._jobs.list_events(job_id, limit=limit, after=after)
            for event in page.items:
                if event.id == known.newest_id:
                    return known.plus(newest_first[::-1])
                newest_first.append(event)
            if not page.has_more:  # what was known is gone, or nothing was
                return Log().plus(newest_first[::-1])


def _point(data: Mapping[str, Any]) -> Point:
    return Point(int(data["step"]), int(data.get("total_steps") or 0), data.get("train_loss"), data.get("valid_loss"))


def _history(jobs: Jobs, job: Job) -> Mapping[str, Sequence[Any]]:
    """Every step's numbers, of a job that has ended well; events tell one a second."""
    return next((run.history for run in jobs.list_runs(job.id) if run.job_type == "train"), {})


def _has_bot(service: Service, job: Job, request: Request) -> bool:
    """Whether its bot is there, for this caller: it may have been deleted since."""
    if job.status is not JobStatus.SUCCEEDED or job.fine_tuned_model is None:
        return False
    with contextlib.suppress(ModelNotFound):
        service.access.find_model(service.catalogue, job.fine_tuned_model, request)
        return True
    return False


# --- What its page shows ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Epoch:
    """A row of the table of losses."""

    name: str
    step: int
    train: float | None
    valid: float


@dataclass(frozen=True)
class JobView:
    """A job for its page. `history`: column -> values, once it is done.

    `counts`: of everybody's jobs by status, while it waits; None: it is not the viewer's to know.
    """

    job: Job
    log: Log
    counts: Mapping[JobStatus, int] | None
    history: Mapping[str, Sequence[Any]]
    has_bot: bool

    @property
    def title(self) -> str:
        return JobLine(self.job).title

    @property
    def status(self) -> str:
        return self.job.status.value

    @property
    def is_final(self) -> bool:
        return self.job.status.is_final

    @property
    def last(self) -> Point | None:
        return self.log.points[-1] if self.log.points else None

    @property
    def phase(self) -> str:
        """What happens now, in words; no numbers that change every second, for it is read out."""
        if self.job.status in _WAITING:
            return self._waiting()
        return _ENDS.get(self.job.status) or self._running()

    def _waiting(self) -> str:
        if self.counts is None:
            return "Waiting for its turn"
        others = sum(self.counts.get(status, 0) for status in _WAITING) - 1
        running = self.counts.get(JobStatus.RUNNING, 0)
        if others <= 0:
            return "Waiting for the job before it" if running else "About to begin"
        return f"Waiting in the queue, with {others:,} other{'s' * (others != 1)}"

    def _running(self) -> str:
        if self.last is not None and self.last.total:
            return "Publishing the bot" if self.last.step >= self.last.total else "Learning"
        if "hyperparameters" in self.job.result:
            return "Loading the base model, and measuring it first"
        return "Loading the base model" if "model_id" in self.job.result else "Reading the archive"

    @property
    def share(self) -> float | None:
        """Of its steps, in per cent; None where it is not known."""
        if self.job.status is JobStatus.SUCCEEDED:
            return 100.0
        return 100.0 * self.last.step / self.last.total if self.last and self.last.total else None

    @property
    def seconds_left(self) -> float | None:
        if self.job.status is not JobStatus.RUNNING or self.job.estimated_finish is None:
            return None
        return max(0.0, self.job.estimated_finish - time.time())

    @property
    def took_s(self) -> float | None:
        return JobLine(self.job).took_s

    @cached_property
    def chart(self) -> Markup:
        train, valid = self._curves
        return charts.loss_chart(train, valid, self.last.total if self.last else 0)

    @cached_property
    def epochs(self) -> list[Epoch]:
        """What was measured on the held-out texts, in order."""
        train, valid = self._curves
        return [
            Epoch(self._when(step).partition(" of ")[0], int(step), _nearest(train, step), loss) for step, loss in valid
        ]

    @cached_property
    def samples(self) -> list[tuple[str, tuple[str, ...]]]:
        """When, and what it wrote; the newest first."""
        by_step = {point.step: (point, texts) for point, texts in self.log.samples}
        newest_first = sorted(by_step.items(), reverse=True)
        return [(self._when(step, point.total), texts) for step, (point, texts) in newest_first]

    @property
    def messages(self) -> list[JobEvent]:
        """The newest first."""
        return list(self.log.messages[::-1])

    @cached_property
    def _curves(self) -> tuple[list[charts.Point], list[charts.Point]]:
        """(step, loss) of training and of held-out texts. What a later attempt did again counts."""
        steps = list(self.history.get("step", ()))
        if steps:
            return _curve(steps, self.history.get("train_loss", ())), _curve(steps, self.history.get("valid_loss", ()))
        told = [point.step for point in self.log.points]
        return (
            _curve(told, [point.train for point in self.log.points]),
            _curve(told, [point.valid for point in self.log.points]),
        )

    def _when(self, step: float, total: int = 0) -> str:
        """ "After epoch 2"; in steps where nothing says how many epochs there are."""
        num_epochs = (self.job.result.get("hyperparameters") or {}).get("n_epochs")
        total = total or (self.last.total if self.last else 0)
        if not step:
            return "Before the first step"
        if not num_epochs or not total:
            return f"After step {step:,.0f}"
        if step >= total:
            return "At the end"
        epochs = step / total * num_epochs
        if abs(epochs - round(epochs)) < 0.02:
            return f"After epoch {round(epochs)} of {num_epochs}"
        return f"After {epochs:.1f} epochs of {num_epochs}"


_ENDS: Mapping[JobStatus, str] = {
    JobStatus.PAUSED: "Paused",
    JobStatus.SUCCEEDED: "Done",
    JobStatus.FAILED: "It did not work",
    JobStatus.CANCELLED: "Cancelled",
}


def _curve(steps: Sequence[float], losses: Sequence[Any]) -> list[charts.Point]:
    """In order of steps, of each the loss told last; without those that are not known or no numbers."""
    known = {
        step: loss
        for step, loss in zip(steps, losses, strict=False)
        if isinstance(loss, int | float) and math.isfinite(loss)
    }
    return sorted(known.items())


def _nearest(curve: Sequence[charts.Point], step: float) -> float | None:
    """The last loss until `step`."""
    number = bisect_right(curve, step, key=lambda point: point[0])
    return curve[number - 1][1] if number else None
