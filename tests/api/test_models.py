"""A model's versions, going back to one, and its picture."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from serve.types import ModelInfo
from tests.api.conftest import World
from tests.fakes.memory import WHOLE

ADA = "huggingtweets/ada"
SPELLINGS = [ADA, "huggingtweets%2Fada", "huggingtweets%2fada"]
PNG = b"\x89PNG\r\n\x1a\n and so on"


@pytest.fixture
def picture(world: World, tmp_path: Path) -> Path:
    world.catalogue.pictures[ADA] = tmp_path / "predictions.png"
    world.catalogue.pictures[ADA].write_bytes(PNG)
    return world.catalogue.pictures[ADA]


@pytest.mark.parametrize("model", SPELLINGS)
async def test_versions_are_listed_newest_first_with_the_one_that_answers(
    client: httpx.AsyncClient, model: str
) -> None:
    listed = (await client.get(f"/v1/models/{model}/versions")).json()
    assert [one["id"] for one in listed["data"]] == [f"{ADA}@abc12{i}" for i in (3, 2, 1)]
    assert [one["is_main"] for one in listed["data"]] == [True, False, False] and not listed["has_more"]
    assert listed["data"][1] == {
        "id": f"{ADA}@abc122",
        "object": "model.version",
        "model": ADA,
        "revision": "abc122",
        "created": 1_699_999_999,
        "bytes": 10,
        "is_main": False,
        "job_id": "ftjob-0",
        "step": 40,
        "losses": {"train": 3.5},
    }


async def test_versions_are_paged(client: httpx.AsyncClient) -> None:
    page = (await client.get(f"/v1/models/{ADA}/versions?limit=2")).json()
    assert page["has_more"] and page["last_id"] == f"{ADA}@abc122"
    page = (await client.get(f"/v1/models/{ADA}/versions", params={"limit": 2, "after": page["last_id"]})).json()
    assert [one["revision"] for one in page["data"]] == ["abc121"] and not page["has_more"]
    answer = await client.get(f"/v1/models/{ADA}/versions?after=nobody")
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "after")


@pytest.mark.parametrize("model", SPELLINGS)
async def test_a_model_goes_back_to_an_earlier_version_and_forth_again(
    client: httpx.AsyncClient, world: World, model: str
) -> None:
    for revision in ("abc121", "abc121", "abc123"):
        answer = await client.post(f"/v1/models/{model}/rollback", json={"revision": revision})
        assert answer.status_code == 200 and answer.json()["is_main"]
        assert answer.json()["id"] == f"{ADA}@{revision}" and world.catalogue.main[ADA] == revision


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"revision": "abc122"}, 409, "revision"),
        ({"revision": "fffffff"}, 404, "revision"),
        ({"revision": "../../etc"}, 404, "model"),
        ({"revision": ""}, 400, "revision"),
        ({"revision": 1}, 400, "revision"),
        ({}, 400, "revision"),
    ],
)
async def test_a_version_that_cannot_answer_is_refused(
    client: httpx.AsyncClient, body: dict[str, object], status: int, param: str
) -> None:
    answer = await client.post(f"/v1/models/{ADA}/rollback", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert answer.headers.get("x-should-retry") == ("false" if status == 409 else None)


@pytest.mark.parametrize("model", [*SPELLINGS, f"{ADA}@main", f"{ADA}@{WHOLE}", f"huggingtweets%2Fada%40{WHOLE}"])
async def test_a_picture_is_a_png_that_caches_ask_for_again(
    client: httpx.AsyncClient, picture: Path, model: str
) -> None:
    answer = await client.get(f"/v1/models/{model}/picture")
    assert (answer.status_code, answer.content) == (200, PNG)
    assert answer.headers["content-type"] == "image/png" and answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"  # of any revision another may be chosen
    etag = answer.headers["etag"]
    for known in (etag, f'"other", W/{etag}', "*"):
        again = await client.get(f"/v1/models/{model}/picture", headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    picture.write_bytes(PNG + b" more")
    again = await client.get(f"/v1/models/{model}/picture", headers={"if-none-match": etag})
    assert again.status_code == 200 and again.headers["etag"] != etag


async def test_a_model_without_a_picture_has_none(client: httpx.AsyncClient, picture: Path) -> None:
    picture.write_bytes(bytes(9 << 20))  # put there by somebody else
    assert (await client.get(f"/v1/models/{ADA}/picture")).status_code == 404
    picture.unlink()
    for model in (ADA, "huggingtweets/bob", "huggingtweets/nobody"):
        assert (await client.get(f"/v1/models/{model}/picture")).status_code == 404


@pytest.mark.parametrize("word", ["versions", "picture", "avatar", "preview"])
async def test_a_bot_may_be_called_like_a_part_of_an_address(
    client: httpx.AsyncClient, world: World, word: str
) -> None:
    bot = f"huggingtweets/{word}"
    assert (await client.get(f"/v1/models/{bot}")).status_code == 404
    world.catalogue.models[bot] = ModelInfo(bot, "abc123", 1_700_000_000, 10, "rookery")
    for path in (bot, f"huggingtweets%2F{word}"):
        assert (await client.get(f"/v1/models/{path}")).json()["id"] == bot
    assert (await client.get(f"/v1/models/{bot}/versions")).json()["data"][0]["model"] == bot
    assert (await client.delete(f"/v1/models/{bot}")).json()["deleted"]
    assert world.jobs.forgotten == [bot]  # what its jobs wrote of its texts goes with it


@pytest.mark.parametrize("path", ["%2e%2e%2fetc", "a%5cb", "a%00", "%ff", "a%2fb%2fc", "..%2f..%2fetc%2fpasswd"])
async def test_b1_an_impossible_model_id_is_404_everywhere(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(f"/v1/models/{path}/versions")).status_code == 404
    assert (await client.get(f"/v1/models/{path}/picture")).status_code == 404
    assert (await client.post(f"/v1/models/{path}/rollback", json={"revision": "a"})).status_code == 404
