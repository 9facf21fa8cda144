"""A job's page, in each of its states."""

from __future__ import annotations

import dataclasses
import re
from html import unescape
from pathlib import Path

import httpx
import pytest

from serve.types import Job, JobEvent, JobRequest, JobStatus, Page, Run, Scope, TrainingFile, Viewer
from serve.web.job import JobView, Log, Logs, Point
from tests.web.conftest import KEY, World, build_world


def said(page: httpx.Response) -> str:
    """The text of a page, without its tags."""
    return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.text)))


def phase(page: httpx.Response) -> str:
    found = re.search(r'id="phase"[^>]*>\s*<strong>([^<]*)', page.text)
    assert found
    return found[1]


async def look(client: httpx.AsyncClient, job: Job) -> httpx.Response:
    page = await client.get(f"/jobs/{job.id}")
    assert page.status_code == 200, page.text
    return page


def tell_step(world: World, job: Job, step: int, train: float | None, valid: float | None = None, *texts: str) -> None:
    world.jobs.tell(
        *(job, f"Step {step}."), step=step, total_steps=100, train_loss=train, valid_loss=valid, samples=list(texts)
    )


async def test_a_waiting_job_says_how_many_others_wait(client: httpx.AsyncClient, world: World) -> None:
    job = world.jobs.begin(JobStatus.QUEUED)
    assert phase(await look(client, job)) == "About to begin"
    running = world.jobs.begin(JobStatus.RUNNING)
    assert phase(await look(client, job)) == "Waiting for the job before it"
    world.jobs.begin(JobStatus.VALIDATING)
    assert phase(await look(client, job)) == "Waiting in the queue, with 1 other"
    assert phase(await look(client, running)) == "Reading the archive"


async def test_a_waiting_job_tells_a_tenant_nothing_of_others(tmp_path: Path) -> None:
    world = build_world(tmp_path, keys=[KEY])
    world.keys.add("of-ada", "ada", [Scope.READ])
    request = JobRequest("fledgling", (TrainingFile("file-0", "ada"),), viewer=Viewer("ada"))
    job = world.jobs.begin(JobStatus.QUEUED, request=request)
    seen = set()
    for status in (None, JobStatus.RUNNING, JobStatus.QUEUED):
        if status is not None:
            world.jobs.begin(status)
        async with world.client("of-ada") as tenant:
            seen.add(phase(await look(tenant, job)))
    assert seen == {"Waiting for its turn"}
    async with world.client(KEY) as operator:
        assert phase(await look(operator, job)) == "Waiting in the queue, with 1 other"


@pytest.mark.parametrize(
    ("result", "steps", "expected"),
    [
        ({}, [], "Reading the archive"),
        ({"model_id": "huggingtweets/ada"}, [], "Loading the base model"),
        ({"model_id": "a", "hyperparameters": {"n_epochs": 4}}, [], "Loading the base model, and measuring it first"),
        ({"model_id": "a"}, [0, 50], "Learning"),
        ({"model_id": "a"}, [0, 50, 100], "Publishing the bot"),
    ],
)
async def test_a_running_job_says_what_it_does(
    client: httpx.AsyncClient, world: World, result: dict[str, object], steps: list[int], expected: str
) -> None:
    job = world.jobs.begin(result=result)
    for step in steps:
        tell_step(world, job, step, 3.5)
    assert phase(await look(client, job)) == expected


async def test_progress_has_a_share_a_step_and_the_time_left(client: httpx.AsyncClient, world: World) -> None:
    job = world.jobs.begin(estimated_finish=4_000_000_000)
    tell_step(world, job, 42, 3.5)
    page = await look(client, job)
    assert '<progress max="100" value="42.0"' in page.text
    assert "42 %, step 42 of 100" in said(page)
    assert " left" in said(page)
    assert "<title>Learning, 42 % – @ada" in page.text


async def test_an_open_job_keeps_its_page_alive_or_has_a_link_where_there_are_no_scripts(
    client: httpx.AsyncClient, world: World
) -> None:
    job = world.jobs.begin()
    page = await look(client, job)
    assert 'data-live="2000"' in page.text and "live.js" in page.text
    assert "http-equiv" not in page.text  # nothing is taken from whoever reads slowly: W3C, F41
    assert re.search(rf'<noscript>.*<a [^>]*href="/jobs/{job.id}">Refresh</a>.*</noscript>', page.text)
    assert page.text.count("aria-live") == 1
    for status in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED):
        page = await look(client, world.jobs.begin(status, fine_tuned_model="huggingtweets/ada"))
        assert not re.search(r"data-live|live\.js|noscript", page.text)


async def test_all_events_make_the_curve_and_new_ones_alone_are_read_again(
    client: httpx.AsyncClient, world: World
) -> None:
    job = world.jobs.begin()
    for step in range(2345):
        world.jobs.tell(job, "", step=step, total_steps=5000, train_loss=4 - step / 1000)
    logs = Logs(world.jobs)
    assert len(logs.read(job).points) == 2345
    world.jobs.tell(job, "One more thing.")
    world.jobs.tell(job, "", step=2345, total_steps=5000, train_loss=1.5)
    asked = len(world.jobs.asked)
    log = logs.read(job)
    assert world.jobs.asked[asked:] == [(job.id, None)]
    assert [point.step for point in log.points] == list(range(2346))
    assert [event.message for event in log.messages] == ["One more thing."]
    assert (
        'aria-label="Loss curve: training loss from 4.00 at step 0 to 1.50 at step 2,345'
        in (await look(client, job)).text
    )


async def test_who_looks_at_the_same_time_reads_new_events_alone_too(world: World) -> None:
    job = world.jobs.begin()
    tell_step(world, job, 1, 3.5)
    logs = Logs(world.jobs)
    first = logs.read(job)
    others: list[Log] = []
    list_events = world.jobs.list_events

    def look_meanwhile(job_id: str, *, limit: int, after: str | None = None) -> Page[JobEvent]:
        world.jobs.list_events = list_events  # type: ignore[method-assign]
        others.append(logs.read(job))
        limits.append(limit)
        return list_events(job_id, limit=limit, after=after)

    limits: list[int] = []
    world.jobs.list_events = look_meanwhile  # type: ignore[method-assign]
    assert logs.read(job) == others[0] == first
    assert limits == [100]
    world.jobs.asked.clear()
    assert logs.read(job) == first
    assert len(world.jobs.asked) == 1


async def test_curves_are_made_once_for_a_page(world: World) -> None:
    job = world.jobs.begin()
    view = JobView(job, Log(points=tuple(Point(step, 9, 4.0, 4.5) for step in range(9))), {}, {}, False)
    assert view.chart is view.chart and view.samples is view.samples
    assert [epoch.train for epoch in view.epochs] == [4.0] * 9


async def test_the_loss_beside_a_measurement_is_the_last_until_then(world: World) -> None:
    points = (Point(0, 9, None, 4.5), Point(1, 9, 4.0, None), Point(2, 9, None, 4.25), Point(3, 9, 3.0, 4.0))
    view = JobView(world.jobs.begin(), Log(points=points), {}, {}, False)
    assert [(epoch.step, epoch.train) for epoch in view.epochs] == [(0, None), (2, 4.0), (3, 3.0)]


async def test_the_page_of_a_long_job_stays_small(client: httpx.AsyncClient, world: World) -> None:
    job = world.jobs.begin()
    for step in range(5000):
        world.jobs.tell(job, "", step=step, total_steps=5000, train_loss=4 - step / 5000)
        world.jobs.tell(job, "Something happened.")
    assert len((await look(client, job)).content) < 40_000


async def test_nothing_is_remembered_of_a_job_that_has_ended(world: World) -> None:
    job = world.jobs.begin()
    tell_step(world, job, 100, 3.5, 3.4, "My dream is tea.")
    logs = Logs(world.jobs)
    assert logs.read(job).samples
    world.jobs.events.clear()  # as by "delete everything"
    assert not logs.read(dataclasses.replace(job, status=JobStatus.CANCELLED)).samples


async def test_events_that_were_erased_are_no_longer_shown(world: World) -> None:
    job = world.jobs.begin()
    logs = Logs(world.jobs)
    tell_step(world, job, 1, 3.5, None, "My dream is tea.")
    assert logs.read(job).samples
    world.jobs.events[job.id] = []
    assert logs.read(job) == Log()


async def test_what_a_later_attempt_did_again_counts(client: httpx.AsyncClient, world: World) -> None:
    job = world.jobs.begin()
    for step, loss in ((10, 3.9), (20, 3.8), (10, 3.7), (20, 3.6), (30, 3.5)):
        tell_step(world, job, step, loss)
    assert "training loss from 3.70 at step 10 to 3.50 at step 30" in (await look(client, job)).text


async def test_samples_come_newest_first_with_their_epoch_and_escaped(client: httpx.AsyncClient, world: World) -> None:
    job = world.jobs.begin(result={"hyperparameters": {"n_epochs": 4}})
    tell_step(world, job, 25, 3.9, 4.0, "My dream is <script>alert(1)</script>")
    tell_step(world, job, 50, 3.8, 3.9, "حلمي")
    page = await look(client, job)
    _, samples = page.text.split('id="samples"')
    assert samples.index("After epoch 2 of 4") < samples.index("After epoch 1 of 4")
    assert '<span class="lead">My dream is</span> &lt;script&gt;' in page.text
    assert '<p class="said" dir="auto">حلمي</p>' in page.text
    assert "<script>alert" not in page.text


async def test_numbers_that_are_none_break_nothing(client: httpx.AsyncClient, world: World) -> None:
    job = world.jobs.begin()
    tell_step(world, job, 1, float("nan"), float("inf"))
    assert "The curve begins with the first step" in (await look(client, job)).text


async def test_a_job_that_is_done_leads_to_its_bot_and_shows_every_step(
    client: httpx.AsyncClient, world: World
) -> None:
    job = world.jobs.begin(
        JobStatus.SUCCEEDED,
        fine_tuned_model="huggingtweets/ada",
        started_at=1_700_000_000,
        finished_at=1_700_000_065,
        result={"hyperparameters": {"n_epochs": 4}},
    )
    history = {"step": [0, 1, 2], "train_loss": [None, 4.0, 3.5], "valid_loss": [4.5, None, 3.75]}
    world.jobs.runs[job.id] = (Run(job.id, "train", "@ada-train", 1, 2, history=history),)
    tell_step(world, job, 2, 3.5, 3.75)
    page = await look(client, job)
    assert '<a class="button" href="/bots/huggingtweets/ada">Play with it</a>' in page.text
    assert "It took 1:05" in said(page)
    assert "training loss from 4.00 at step 1 to 3.50 at step 2; held-out loss from 4.50 at step 0" in page.text
    assert "Before the first step" in page.text


async def test_a_job_whose_bot_was_deleted_says_so(client: httpx.AsyncClient, world: World) -> None:
    job = world.jobs.begin(JobStatus.SUCCEEDED, fine_tuned_model="huggingtweets/ada")
    assert "Play with it" in (await look(client, job)).text
    world.catalogue.delete_model("huggingtweets/ada")
    page = await look(client, job)
    assert "Play with it" not in page.text
    assert "Its bot has been deleted since" in page.text


async def test_a_job_that_failed_says_why_and_what_to_do(client: httpx.AsyncClient, world: World) -> None:
    job = world.jobs.begin(JobStatus.FAILED, error_code="disk_full", error_message="The disk is <full>.")
    page = await look(client, job)
    assert phase(page) == "It did not work"
    assert "The disk is &lt;full&gt;." in page.text
    assert 'href="/make"' in page.text


@pytest.mark.parametrize(
    ("do", "status", "offered"),
    [
        ("pause", JobStatus.PAUSED, "resume"),
        ("cancel", JobStatus.CANCELLED, None),
    ],
)
async def test_buttons_change_the_job_and_come_back(
    client: httpx.AsyncClient, world: World, do: str, status: JobStatus, offered: str | None
) -> None:
    job = world.jobs.begin()
    assert f'name="do" value="{do}"' in (await look(client, job)).text
    reply = await client.post(f"/jobs/{job.id}", data={"do": do})
    assert (reply.status_code, reply.headers["location"]) == (303, f"/jobs/{job.id}")
    assert world.jobs.get_job(job.id).status is status
    page = await look(client, job)
    assert (offered is None) or f'name="do" value="{offered}"' in page.text


async def test_a_paused_job_goes_on(client: httpx.AsyncClient, world: World) -> None:
    job = world.jobs.begin(JobStatus.PAUSED)
    assert phase(await look(client, job)) == "Paused"
    await client.post(f"/jobs/{job.id}", data={"do": "resume"})
    assert world.jobs.get_job(job.id).status is JobStatus.QUEUED


async def test_a_button_that_came_too_late_shows_how_it_ended(client: httpx.AsyncClient, world: World) -> None:
    job = world.jobs.begin(JobStatus.CANCELLED)
    reply = await client.post(f"/jobs/{job.id}", data={"do": "pause"})
    assert reply.status_code == 303


async def test_what_is_no_button_is_refused_with_a_page(client: httpx.AsyncClient, world: World) -> None:
    job = world.jobs.begin()
    reply = await client.post(f"/jobs/{job.id}", data={"do": "explode"})
    assert reply.status_code == 400
    assert "text/html" in reply.headers["content-type"]


async def test_a_job_that_is_nowhere_is_a_page_that_says_so(client: httpx.AsyncClient) -> None:
    reply = await client.get("/jobs/ftjob-x")
    assert reply.status_code == 404
    assert "There is no such job." in reply.text


async def test_jobs_are_for_those_with_a_key(stranger: httpx.AsyncClient, locked_world: World) -> None:
    job = locked_world.jobs.begin()
    for reply in (await stranger.get(f"/jobs/{job.id}"), await stranger.post(f"/jobs/{job.id}", data={"do": "cancel"})):
        assert reply.headers["location"].startswith("/login")
    assert locked_world.jobs.get_job(job.id).status is JobStatus.RUNNING
