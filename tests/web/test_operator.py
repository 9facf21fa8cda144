"""The operator's page and the list of jobs, as a browser without scripts sees them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.errors import NotFound, StoreUnavailable
from serve.types import Eviction, JobStatus, Resident
from serve.web import jobs_list, operator
from tests.fakes.generator import replica_view
from tests.web.conftest import KEY, World, build_world

ADA = Resident("huggingtweets/ada", "abc1234567890", "disk", 249_000_000, 2, 0.0)
BOB = Resident("huggingtweets/bob", "def456", "hub", 249_000_000, 0, 190.0)
GONE = Eviction("huggingtweets/eve", "fff999", "budget", 249_000_000, 12.0)


async def read(client: httpx.AsyncClient, path: str) -> str:
    answer = await client.get(path)
    assert answer.status_code == 200, answer.text
    return answer.text


def rows(page: str, id: str) -> list[list[str]]:
    """The words of each cell of a <tbody>, or of the one that tells that there are none."""
    [body] = re.findall(rf'<tbody id="{id}".*?>(.*?)</tbody>', page, re.DOTALL)
    cells = [
        re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL) for row in re.findall(r"<tr>(.*?)</tr>", body, re.S)
    ]
    return [[" ".join(re.sub("<[^>]+>", " ", cell).split()) for cell in row] for row in cells]


# --- The operator's page --------------------------------------------------------------------------------------


async def test_the_operator_sees_replicas_residents_and_evictions(client: httpx.AsyncClient, world: World) -> None:
    world.generator.views = [replica_view("r1", ADA, BOB, evictions=[GONE]), replica_view("r2")]
    page = await read(client, "/admin")
    assert rows(page, "replica-rows") == [
        ["r1", "cpu, float32", "498.0 MB of 1.1 GB", "2", "0", "0", "0", "60 s"],
        ["r2", "cpu, float32", "0 B of 1.1 GB", "0", "0", "0", "0", "60 s"],
    ]
    assert '<meter min="0" max="1073741824" value="498000000" aria-label="Memory used by r1">' in page
    assert rows(page, "resident-rows") == [
        ["huggingtweets/ada", "abc1234", "disk", "249.0 MB", "2", "in use", "r1"],
        ["huggingtweets/bob", "def456", "hub", "249.0 MB", "0", "3 min ago", "r1"],
    ]
    assert '<a href="/bots/huggingtweets/ada"' in page
    assert rows(page, "eviction-rows") == [["huggingtweets/eve", "fff999", "budget", "249.0 MB", "12 s ago", "r1"]]
    for address in ("/metrics", "/healthz", "/readyz", "/openapi.json"):
        assert f'<a href="{address}">' in page and (await client.get(address)).status_code == 200


async def test_the_most_used_are_listed_with_their_bounds(client: httpx.AsyncClient, world: World) -> None:
    world.generator.usage.add("huggingtweets/ada", "8c3952a5", 1200)
    world.generator.usage.add("<script>alert(1)</script>", "", 0)
    page = await read(client, "/admin/top")
    assert rows(page, "models-by-requests-rows") == [
        ["&lt;script&gt;alert(1)&lt;/script&gt;", "1", "0"],
        ["huggingtweets/ada", "1", "1,200"],
    ]
    assert rows(page, "callers-by-tokens-rows") == [["8c3952a5", "1", "1,200"]]
    assert "<script>alert" not in page and "2 requests and 1,200 tokens" in page
    assert '<a href="/admin/top">' in await read(client, "/admin")
    told = await client.get("/admin/top", headers={"accept": "application/json"}, follow_redirects=True)
    assert told.url.path == "/v1/top" and told.json()["models"]["by_tokens"][0]["model"] == "huggingtweets/ada"


async def test_counts_that_are_not_exact_are_told_as_bounds(client: httpx.AsyncClient, world: World) -> None:
    for number in range(5000):
        world.generator.usage.add(f"huggingtweets/user{number}", "", 1)
    counts = [row[1] for row in rows(await read(client, "/admin/top"), "models-by-requests-rows")]
    assert len(counts) == 20 and all(re.fullmatch(r"1 to \d+", count) for count in counts)


async def test_nobody_without_a_key_sees_who_asks_most(tmp_path: Path) -> None:
    world = build_world(tmp_path, keys=[KEY])
    async with world.client() as stranger, world.client(KEY) as operator:
        assert (await stranger.get("/admin/top")).status_code == 303
        assert (await stranger.get("/v1/top", headers={"accept": "application/json"})).status_code == 401
        assert (await operator.get("/admin/top")).status_code == 200


async def test_jobs_are_counted_by_state_and_the_latest_are_linked(client: httpx.AsyncClient, world: World) -> None:
    jobs = [world.jobs.begin(handle=f"bot{number}") for number in range(12)]
    world.jobs.pause_job(jobs[0].id)
    page = await read(client, "/admin")
    assert "11 running" in page and "1 paused" in page and "0 queued" in page
    assert [row[0] for row in rows(page, "job-rows")] == [f"@bot{number}" for number in range(11, 1, -1)]
    assert f'<a href="/jobs/{jobs[-1].id}"' in page


async def test_of_very_many_residents_the_last_used_are_shown(
    client: httpx.AsyncClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "_NUM_RESIDENTS", 2)
    held = [Resident(f"a/m{number}", "abc", "disk", 1, 0, 100.0 - number) for number in range(5)]
    world.generator.views = [replica_view("r1", *held[:3]), replica_view("r2", *held[3:])]
    found = rows(await read(client, "/admin"), "resident-rows")
    assert [row[0] for row in found] == ["a/m4", "a/m3", "3 more, used longer ago: /v1/replicas has them all."]


async def test_what_is_away_is_said_and_the_rest_is_shown(client: httpx.AsyncClient, world: World) -> None:
    def away(*args: Any, **named: Any) -> Any:
        raise StoreUnavailable("The database is away.")

    async def gone() -> Any:
        raise StoreUnavailable("No generator answers now.")

    world.generator.is_ready, world.generator.replicas = False, gone  # type: ignore[method-assign]
    world.jobs.count_jobs = world.jobs.list_jobs = away  # type: ignore[method-assign]
    page = await read(client, "/admin")
    assert "not ready" in page and "No generator answers now" in page and "database of jobs does not answer" in page


async def test_what_changes_on_the_page_refreshes_itself_and_has_a_link_for_it(client: httpx.AsyncClient) -> None:
    page = await read(client, "/admin")
    live = re.findall(r'<\w+[^>]*id="([\w-]+)"[^>]*data-live="2000"', page)
    assert live == ["facts", "replica-rows", "job-counts", "job-rows", "resident-rows", "eviction-rows"]
    assert '<a class="button quiet small" href="/admin">Refresh</a>' in page


async def test_names_from_strangers_are_text(client: httpx.AsyncClient, world: World) -> None:
    evil = '<script>alert("x")</script>'
    world.generator.views = [replica_view(evil, Resident(f"a/{evil}", evil, "disk", 1, 0, 1.0))]
    world.jobs.begin(handle=evil)
    for path in ("/admin", "/jobs"):
        page = await read(client, path)
        assert evil not in page and "&lt;script&gt;" in page


@pytest.mark.parametrize("path", ["/admin", "/jobs", "/jobs?after=ftjob-1"])
async def test_where_keys_are_set_a_browser_is_sent_to_sign_in_and_back(
    locked_world: World, stranger: httpx.AsyncClient, path: str
) -> None:
    locked_world.jobs.begin(), locked_world.jobs.begin()
    refused = await stranger.get(path)
    assert refused.status_code == 303 and refused.headers["location"].startswith("/login?next=")
    sign_in = await stranger.get(refused.headers["location"])
    [onward] = re.findall(r'name="next" value="([^"]*)"', sign_in.text)
    signed_in = await stranger.post("/login", data={"key": KEY, "next": onward})
    assert (signed_in.status_code, signed_in.headers["location"]) == (303, path)
    await read(stranger, path)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (119, "119 s"), (121, "2 min"), (7_300, "2 h"), (200_000, "2 days")]
)
def test_ages_are_short(seconds: float, text: str) -> None:
    assert operator.age(seconds) == text


# --- The list of jobs -----------------------------------------------------------------------------------------


async def test_jobs_are_listed_newest_first_in_pages(
    client: httpx.AsyncClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_list, "PAGE_SIZE", 3)
    for handle in "abcd":
        world.jobs.begin(handle=handle)
    first = await read(client, "/jobs")
    assert [row[:2] for row in rows(first, "jobs")] == [["@d", "running"], ["@c", "running"], ["@b", "running"]]
    [older] = re.findall(r'<a class="next" href="([^"]*)"', first)
    second = await read(client, older)
    assert [row[0] for row in rows(second, "jobs")] == ["@a"] and 'rel="next"' not in second
    assert "data-live" in first and "data-live" not in second


async def test_a_finished_job_leads_to_its_bot(client: httpx.AsyncClient, world: World) -> None:
    told: dict[str, Any] = {"result": {"counts": {"ada": {}, "bob": {}}}, "fine_tuned_model": "huggingtweets/ada"}
    world.jobs.begin(JobStatus.SUCCEEDED, started_at=1_700_000_000, finished_at=1_700_000_065, **told)
    page = await read(client, "/jobs")
    [row] = rows(page, "jobs")
    assert row[:3] == ["@ada & @bob".replace("&", "&amp;"), "succeeded", "huggingtweets/ada"] and row[4] == "1:05"
    assert '<a href="/bots/huggingtweets/ada"' in page


async def test_without_jobs_the_list_says_how_to_begin(client: httpx.AsyncClient) -> None:
    assert rows(await read(client, "/jobs"), "jobs") == [["There is no job yet. Make a bot."]]


async def test_a_place_in_the_list_that_is_no_job_is_a_page_that_says_so(
    client: httpx.AsyncClient, world: World
) -> None:
    def refuse(**named: Any) -> Any:
        raise NotFound("There is no job 'ftjob-none'.")

    world.jobs.list_jobs = refuse  # type: ignore[method-assign]
    answer = await client.get("/jobs?after=ftjob-none")
    assert answer.status_code == 404 and "There is no job" in answer.text and "<html" in answer.text
