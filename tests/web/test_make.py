"""From an archive to a job: upload, look, correct, agree, train."""

from __future__ import annotations

import gc
import re
import weakref
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlsplit

import httpx
import pytest

from serve.training.dataset import preview
from serve.types import BOT_PURPOSE, Visibility
from tests.training.archive_files import tweet, x_zip
from tests.web.conftest import LIMITS, World, build_world, upload_form

TEXTS = [
    f"The goose of house {number} has laid <b>{number}</b> eggs behind our old fence, again." for number in range(200)
]


@pytest.fixture
def archive(tmp_path: Path) -> bytes:
    """Enough of Ada_L's tweets."""
    return x_zip(tmp_path / "x.zip", [tweet(number, text) for number, text in enumerate(TEXTS)]).read_bytes()


@pytest.fixture
def small_archive(tmp_path: Path) -> bytes:
    return x_zip(tmp_path / "small.zip", [tweet(1, "There is one goose here.")]).read_bytes()


def plain() -> bytes:
    """Nobody's: it does not say whose posts these are."""
    return "\n".join(TEXTS).encode()


async def upload(client: httpx.AsyncClient, *slots: tuple[str, bytes, str]) -> httpx.Response:
    """Each slot a file's name, its bytes, and a handle; slots that are left empty follow, as on the page."""
    filled = [*slots, *[("", b"", "")] * (3 - len(slots))]
    parts: list[tuple[str, str | None, bytes]] = []
    for name, content, handle in filled:
        parts += [("archive", name, content), ("handle", None, handle.encode())]
    headers, body = upload_form(*parts)
    return await client.post("/make", headers=headers, content=body)


async def review(client: httpx.AsyncClient, *slots: tuple[str, bytes, str]) -> httpx.Response:
    """The second step, as a browser comes to it."""
    reply = await upload(client, *slots)
    assert reply.status_code == 303, reply.text
    return await client.get(reply.headers["location"])


def fields_of(page: httpx.Response) -> dict[str, Any]:
    """What its form would send."""
    fields: dict[str, Any] = {}
    for tag in re.findall(r"<input[^>]+>", page.text):
        attributes = dict(re.findall(r'(\w+)="([^"]*)"', tag))
        if attributes.get("type") != "checkbox" and "name" in attributes:
            fields.setdefault(attributes["name"], []).append(unescape(attributes["value"]))
    return fields


def said(page: httpx.Response) -> str:
    """The text of a page, without its tags."""
    return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.text)))


# --- The first step -----------------------------------------------------------------------------------------


async def test_the_first_step_offers_three_people_and_works_without_a_script(client: httpx.AsyncClient) -> None:
    page = await client.get("/make")
    assert page.status_code == 200
    assert page.text.count('type="file"') == 3
    assert 'method="post" action="/make" enctype="multipart/form-data"' in page.text
    assert "The archive is deleted when its job ends" in said(page)


async def test_an_upload_waits_as_a_file_and_is_shown_on_a_page_with_an_address(
    client: httpx.AsyncClient, world: World, archive: bytes
) -> None:
    reply = await upload(client, ("my x.zip", archive, ""))
    assert reply.status_code == 303
    assert reply.headers["location"] == "/make/review?file=file-0"
    assert [record.purpose for record in world.files.records.values()] == [BOT_PURPOSE]
    assert not list(world.upload_dir.iterdir())


async def test_what_cannot_be_read_is_refused_at_once_and_nothing_stays(
    client: httpx.AsyncClient, world: World, archive: bytes
) -> None:
    reply = await upload(client, ("good.zip", archive, "@ada"), ("holiday.jpg", b"\xff\xd8\xff\xe0" * 100, "<bob>"))
    assert reply.status_code == 400
    assert 'role="alert"' in reply.text
    assert 'value="@ada"' in reply.text and 'value="&lt;bob&gt;"' in reply.text  # what was typed is there still
    assert not world.files.records
    assert not list(world.upload_dir.iterdir())


async def test_a_form_without_a_file_asks_for_one(client: httpx.AsyncClient) -> None:
    reply = await upload(client)
    assert reply.status_code == 400
    assert "Choose an archive first" in reply.text


async def test_an_empty_file_is_not_an_unused_field(client: httpx.AsyncClient) -> None:
    reply = await upload(client, ("empty.zip", b"", ""))
    assert reply.status_code == 400
    assert "The file is empty" in reply.text


async def test_what_is_no_handle_is_refused_with_the_upload(client: httpx.AsyncClient, world: World) -> None:
    reply = await upload(client, ("posts.txt", plain(), "no handle"))
    assert reply.status_code == 400
    assert "A handle is" in reply.text
    assert not world.files.records


async def test_too_much_is_refused_with_a_way_on(tmp_path: Path) -> None:
    world = build_world(tmp_path)
    async with world.client() as client:
        reply = await upload(client, ("big.zip", b"x" * (LIMITS.upload_bytes + 1), ""))
    assert reply.status_code == 413
    assert "larger than 1 MB" in reply.text and "data/tweets.js" in reply.text
    assert not list(world.upload_dir.iterdir())


async def test_a_form_of_another_kind_is_refused_with_the_form(client: httpx.AsyncClient) -> None:
    reply = await client.post("/make", content=b"a=b", headers={"content-type": "application/x-www-form-urlencoded"})
    assert reply.status_code == 415
    assert 'id="upload"' in reply.text


async def test_a_key_is_asked_for_where_one_is_needed(stranger: httpx.AsyncClient, archive: bytes) -> None:
    page = await stranger.get("/make")
    assert (page.status_code, page.headers["location"]) == (303, "/login?next=%2Fmake")
    reply = await upload(stranger, ("x.zip", archive, ""))
    assert reply.headers["location"] == "/login?next=%2Fmake"


# --- The second step ----------------------------------------------------------------------------------------


async def test_the_second_step_shows_counts_samples_and_the_name(client: httpx.AsyncClient, archive: bytes) -> None:
    page = await review(client, ("my <x>.zip", archive, ""))
    assert page.status_code == 200
    text = said(page)
    assert "200 posts are kept" in text
    assert "huggingtweets/ada_l" in text
    assert page.text.count('<p dir="auto" class="clipped">') == 8
    assert "<b>" not in page.text and "&lt;b&gt;" in page.text
    assert "my <x>.zip" not in page.text
    assert fields_of(page)["handle"] == ["Ada_L"]


async def test_a_handle_can_be_corrected(client: httpx.AsyncClient, world: World, archive: bytes) -> None:
    page = await review(client, ("x.zip", archive, ""))
    corrected = await client.get("/make/review", params={**fields_of(page), "handle": "@Eve", "seed": "7"})
    assert "huggingtweets/eve" in said(corrected)
    assert fields_of(corrected)["seed"] == ["7"]


async def test_a_handle_that_is_none_is_told_beside_what_was_typed(client: httpx.AsyncClient, archive: bytes) -> None:
    page = await review(client, ("x.zip", archive, ""))
    again = await client.get("/make/review", params={**fields_of(page), "handle": "no handle"})
    assert again.status_code == 400
    assert "A handle is" in again.text
    assert fields_of(again)["handle"] == ["no handle"]


async def test_two_people_have_a_line_each_and_one_together(client: httpx.AsyncClient, archive: bytes) -> None:
    page = await review(client, ("x.zip", archive, ""), ("posts.txt", plain(), "bob"))
    assert fields_of(page)["handle"] == ["Ada_L", "bob"]
    assert "huggingtweets/ada_l-bob" in said(page)
    assert ">All</th>" in page.text
    assert "400 posts are kept" in said(page)


async def test_an_archive_that_does_not_say_whose_it_is_asks(client: httpx.AsyncClient, world: World) -> None:
    page = await review(client, ("posts.txt", plain(), ""))
    assert "Nothing says whose posts these are" in page.text
    reply = await client.post("/make/review", data={**fields_of(page), "consent": "yes"})
    assert reply.status_code == 400
    assert "each archive needs a handle" in reply.text
    assert not world.jobs.jobs


async def test_too_little_text_stops_here_and_says_why(
    client: httpx.AsyncClient, archive: bytes, small_archive: bytes
) -> None:
    page = await review(client, ("small.zip", small_archive, ""))
    assert "There is too little text to learn from" in page.text
    assert "training needs at least 6,000" in page.text
    assert ">Train<" not in page.text
    both = await review(client, ("x.zip", archive, ""), ("small.zip", small_archive, "bob"))
    assert ">Train<" not in both.text


async def test_a_file_that_is_gone_says_to_choose_it_again(
    client: httpx.AsyncClient, world: World, archive: bytes
) -> None:
    page = await review(client, ("x.zip", archive, ""))
    world.files.delete_file("file-0")
    for reply in (
        await client.get("/make/review?file=file-0"),
        await client.get("/make/review"),
        await client.get("/make/review?file=%00"),
        await client.get("/make/review?" + "file=file-0&" * 100),
        await client.post("/make/review", data={**fields_of(page), "consent": "yes"}),
    ):
        assert reply.status_code == 404
        assert "Choose it once more" in reply.text and 'href="/make"' in reply.text


async def test_archives_are_read_once_for_many_looks(tmp_path: Path, archive: bytes) -> None:
    num_looks = 0

    def look(*args: Any, **options: Any) -> Any:
        nonlocal num_looks
        num_looks += 1
        return preview(*args, **options)

    world = build_world(tmp_path, look=look)
    async with world.client() as client:
        page = await review(client, ("x.zip", archive, ""))
        await client.get(str(page.url))
        assert (await client.head(str(page.url))).status_code == 200
    assert num_looks == 1


class Report(dict[str, Any]):
    """One that can be seen to go."""


@pytest.mark.parametrize("do", [{"do": "discard"}, {"consent": "yes"}])
async def test_what_was_read_goes_with_the_archive(tmp_path: Path, archive: bytes, do: dict[str, str]) -> None:
    reports: list[weakref.ref[Report]] = []

    def look(*args: Any, **options: Any) -> Report:
        report = Report(preview(*args, **options))
        reports.append(weakref.ref(report))
        return report

    world = build_world(tmp_path, look=look)
    async with world.client() as client:
        page = await review(client, ("x.zip", archive, ""))
        await client.get("/make/review", params={**fields_of(page), "handle": "eve"})
        other = await review(client, ("x.zip", archive, ""))
        assert (await client.post("/make/review", data={**fields_of(page), **do})).status_code == 303
        gc.collect()
        assert [report() is None for report in reports] == [True, True, False]
        assert (await client.get(str(other.url))).status_code == 200
    assert len(reports) == 3


async def test_a_script_can_ask_whether_an_archive_waits(client: httpx.AsyncClient, archive: bytes) -> None:
    page = await review(client, ("x.zip", archive, ""))
    reply = await client.head(str(page.url))
    assert (reply.status_code, reply.content) == (200, b"")
    await client.post("/make/review", data={**fields_of(page), "do": "discard"})
    assert (await client.head(str(page.url))).status_code == 404


async def test_a_bot_of_that_name_is_said_to_get_a_new_version(
    client: httpx.AsyncClient, world: World, archive: bytes
) -> None:
    page = await review(client, ("x.zip", archive, ""))
    assert "is here already" not in page.text
    for changed in ({"handle": "ADA"}, {"suffix": "Ada"}):
        page = await client.get("/make/review", params={**fields_of(page), **changed})
        assert "huggingtweets/ada is here already: this becomes its newest version, and you can roll back" in said(page)
        assert 'href="/bots/huggingtweets/ada"' in page.text
    page = await client.get("/make/review", params={**fields_of(page), "suffix": "ada@abc123"})
    assert (page.status_code, "is here already" in page.text) == (200, False)


async def test_a_private_bot_of_that_name_is_said_to_those_with_a_key(
    owner: httpx.AsyncClient, locked_world: World, archive: bytes
) -> None:
    locked_world.catalogue.set_visibility("huggingtweets/ada", Visibility.PRIVATE)
    page = await review(owner, ("x.zip", archive, "ada"))
    assert "huggingtweets/ada is here already" in said(page)


# --- Training -----------------------------------------------------------------------------------------------


async def test_training_needs_consent(client: httpx.AsyncClient, world: World, archive: bytes) -> None:
    page = await review(client, ("x.zip", archive, ""))
    reply = await client.post("/make/review", data={**fields_of(page), "suffix": "goose"})
    assert reply.status_code == 400
    assert "Tick the box first" in reply.text
    assert fields_of(reply)["suffix"] == ["goose"]  # nothing typed is lost
    assert not world.jobs.jobs


async def test_train_makes_the_job_that_was_asked_for(client: httpx.AsyncClient, world: World, archive: bytes) -> None:
    page = await review(client, ("x.zip", archive, ""))
    options = {"suffix": "goose", "n_epochs": "2", "seed": "7", "base_model": "gpt2", "consent": "yes"}
    reply = await client.post("/make/review", data={**fields_of(page), **options})
    assert (reply.status_code, reply.headers["location"]) == (303, "/jobs/ftjob-0")
    request = world.jobs.jobs["ftjob-0"].request
    assert [(file.file_id, file.handle) for file in request.files] == [("file-0", "Ada_L")]
    assert (request.suffix, request.seed, request.base_model) == ("goose", 7, "gpt2")
    assert request.hyperparameters.n_epochs == 2


async def test_a_double_click_makes_one_job(client: httpx.AsyncClient, world: World, archive: bytes) -> None:
    page = await review(client, ("x.zip", archive, ""))
    sent = {**fields_of(page), "consent": "yes"}
    replies = [await client.post("/make/review", data=sent) for _ in range(2)]
    assert [reply.headers["location"] for reply in replies] == ["/jobs/ftjob-0"] * 2
    assert len(world.jobs.jobs) == 1


async def test_going_back_to_the_page_and_training_again_makes_no_second_job(
    client: httpx.AsyncClient, world: World, archive: bytes
) -> None:
    page = await review(client, ("x.zip", archive, ""))
    first = await client.post("/make/review", data={**fields_of(page), "consent": "yes"})
    again = await client.get(str(page.url))  # loaded anew: no page is kept
    second = await client.post("/make/review", data={**fields_of(again), "handle": "@Ada_L", "consent": "yes"})
    assert first.headers["location"] == second.headers["location"] == "/jobs/ftjob-0"
    assert len(world.jobs.jobs) == 1


async def test_going_back_and_changing_something_makes_another_job(
    client: httpx.AsyncClient, world: World, archive: bytes
) -> None:
    page = await review(client, ("x.zip", archive, ""))
    for seed in ("1", "2"):
        reply = await client.post("/make/review", data={**fields_of(page), "seed": seed, "consent": "yes"})
        assert reply.status_code == 303
    assert len(world.jobs.jobs) == 2


@pytest.mark.parametrize(
    ("field", "value", "said_of_it"),
    [
        ("n_epochs", "many", "n_epochs"),
        ("seed", "-1", "seed"),
        ("base_model", "../etc", "model id"),
        ("suffix", "no name", "suffix"),
        ("handle", "short", "at least 20 are needed"),
    ],
)
async def test_what_a_job_refuses_is_said_on_the_same_page(
    client: httpx.AsyncClient, world: World, archive: bytes, field: str, value: str, said_of_it: str
) -> None:
    page = await review(client, ("x.zip", archive, ""))
    reply = await client.post("/make/review", data={**fields_of(page), field: value, "consent": "yes"})
    assert 400 <= reply.status_code < 500
    assert said_of_it in said(reply)
    assert fields_of(reply)[field] == [value]
    assert not world.jobs.jobs


async def test_an_upload_can_be_thrown_away(client: httpx.AsyncClient, world: World, archive: bytes) -> None:
    page = await review(client, ("x.zip", archive, ""))
    reply = await client.post("/make/review", data={**fields_of(page), "do": "discard"})
    assert reply.headers["location"] == "/make"
    assert not world.files.records


async def test_the_address_of_a_look_carries_handles_that_were_typed(client: httpx.AsyncClient) -> None:
    reply = await upload(client, ("posts.txt", plain(), "@bob"))
    assert parse_qsl(urlsplit(reply.headers["location"]).query) == [("file", "file-0"), ("handle", "@bob")]


async def test_whoever_has_to_sign_in_again_comes_back_to_the_archive(
    stranger: httpx.AsyncClient, owner: httpx.AsyncClient, archive: bytes
) -> None:
    reply = await upload(owner, ("x.zip", archive, "@ada"))
    page = await owner.get(reply.headers["location"] + "&suffix=goose")
    form = re.search(r'<form id="draft" method="post" action="([^"]+)"', page.text)
    assert form
    refused = await stranger.post(unescape(form[1]), data={**fields_of(page), "consent": "yes"})
    login = urlsplit(refused.headers["location"])
    assert (refused.status_code, login.path) == (303, "/login")
    [onward] = parse_qs(login.query)["next"]
    again = await owner.get(onward)
    assert fields_of(again) == fields_of(page)
    assert fields_of(again)["suffix"] == ["goose"]


async def test_a_signed_in_browser_goes_all_the_way(
    owner: httpx.AsyncClient, locked_world: World, archive: bytes
) -> None:
    page = await review(owner, ("x.zip", archive, ""))
    reply = await owner.post("/make/review", data={**fields_of(page), "consent": "yes"})
    assert reply.headers["location"] == "/jobs/ftjob-0"
    assert locked_world.jobs.jobs["ftjob-0"].request.owner
