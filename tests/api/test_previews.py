"""A model's faces, and the text that is chosen to stand for it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import httpx
import pytest

from serve.api.access import Access
from serve.api.app import build_api
from serve.api.previews import draw_letter
from serve.api.service import DrawPreview
from serve.types import ModelInfo, Visibility
from tests.api.conftest import World
from tests.fakes.keys import MemoryKeys
from tests.fakes.memory import WHOLE, memory_draw_preview

ADA = "huggingtweets/ada"
SPELLINGS = [ADA, "huggingtweets%2Fada", "huggingtweets%2fada"]
WEBP = b"RIFF\x10\0\0\0WEBPVP8 and so on"
TEXT = {"text": "My dream is a sea.", "prompt": "My dream is"}


@pytest.fixture
def face(world: World, tmp_path: Path) -> Path:
    world.catalogue.models[ADA] = replace(world.catalogue.models[ADA], handles=("ada", "bob"), num_avatars=1)
    (tmp_path / "0.webp").write_bytes(WEBP)
    world.catalogue.avatars[ADA] = [tmp_path / "0.webp"]
    return tmp_path / "0.webp"


def client_of(world: World, access: Access | None = None, draw_preview: DrawPreview | None = None) -> httpx.AsyncClient:
    app = build_api(
        generator=world.generator,
        catalogue=world.catalogue,
        files=world.files,
        jobs=world.jobs,
        upload_dir=world.upload_dir,
        draw_preview=draw_preview,
        access=access,
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://rookery")


def letter_of(info: ModelInfo, number: int = 0) -> str | None:
    return ElementTree.fromstring(draw_letter(info, number)).findtext("{http://www.w3.org/2000/svg}text")


# --- Faces ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [*SPELLINGS, f"{ADA}@main", f"{ADA}@{WHOLE}", f"huggingtweets%2Fada%40{WHOLE}"])
@pytest.mark.parametrize("query", ["", "?number=0"])
async def test_a_face_is_a_webp_that_caches_may_keep(
    client: httpx.AsyncClient, face: Path, model: str, query: str
) -> None:
    answer = await client.get(f"/v1/models/{model}/avatar{query}")
    assert (answer.status_code, answer.content) == (200, WEBP)
    assert answer.headers["content-type"] == "image/webp" and answer.headers["x-content-type-options"] == "nosniff"
    assert ("immutable" in answer.headers["cache-control"]) is (WHOLE in model)
    again = await client.get(f"/v1/models/{model}/avatar", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


async def test_who_has_no_face_has_a_letter_of_its_own_colour(client: httpx.AsyncClient, face: Path) -> None:
    colours = set()
    for path in (f"{ADA}/avatar?number=1", f"{ADA}/avatar?number=2", "huggingtweets/bob/avatar", "fledgling/avatar"):
        answer = await client.get(f"/v1/models/{path}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/svg+xml")
        assert answer.headers["x-content-type-options"] == "nosniff" and len(answer.content) < 500
        assert answer.content == (await client.get(f"/v1/models/{path}")).content
        colours |= set(re.findall(rb'fill="(#[0-9a-f]{6})"', answer.content))
    assert len(colours) == 4


def test_letter_is_the_first_that_can_be_seen_of_the_name_shown() -> None:
    info = ModelInfo(ADA, "abc", 0, 0, "x", handles=("ada", "_7bob"))
    assert [letter_of(info, number) for number in range(3)] == ["A", "7", "A"]
    for name, letter in {
        "<script>alert(1)</script>": "S",
        "&amp;": "A",
        "\ud800\u202e\0😀 élan": "É",
        "عدا": "ع",
        "海": "海",
        "😀": "A",  # of the handle
    }.items():
        assert letter_of(replace(info, names={"ada": name})) == letter
    assert letter_of(ModelInfo("huggingtweets/___", "abc", 0, 0, "x")) == "?"


def test_white_can_be_read_on_the_colour_of_any_letter() -> None:
    for number in range(200):
        [colour] = re.findall(rb'fill="#([0-9a-f]{6})"', draw_letter(ModelInfo(f"x/{number}", "", 0, 0, ""), 0))
        red, green, blue = ((int(colour[i : i + 2], 16) / 255) ** 2.2 for i in (0, 2, 4))
        assert 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05) > 4.5


@pytest.mark.parametrize("number", ["-1", "8", "x", "1.5", "9" * 30])
async def test_a_number_that_no_handle_has_is_refused(client: httpx.AsyncClient, number: str) -> None:
    assert (await client.get(f"/v1/models/{ADA}/avatar?number={number}")).status_code == 400


async def test_a_model_that_is_not_here_or_private_has_no_face_for_a_stranger(world: World, face: Path) -> None:
    world.catalogue.set_visibility(ADA, Visibility.PRIVATE)
    async with client_of(world, Access(MemoryKeys("key")), memory_draw_preview) as client:
        for model in (ADA, "huggingtweets/nobody", "%2e%2e%2fetc"):
            assert (await client.get(f"/v1/models/{model}/avatar")).status_code == 404
        assert (await client.post(f"/v1/models/{ADA}/preview", json=TEXT)).status_code == 401
        with_key = {"authorization": "Bearer key"}
        answer = await client.get(f"/v1/models/{ADA}@{WHOLE}/avatar", headers=with_key)
        assert answer.content == WEBP and answer.headers["cache-control"].startswith("private")
        assert (await client.post(f"/v1/models/{ADA}/preview", json=TEXT, headers=with_key)).status_code == 200


# --- Choosing a preview -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", SPELLINGS)
async def test_a_text_is_chosen_and_drawn_with_the_faces(
    client: httpx.AsyncClient, world: World, face: Path, model: str
) -> None:
    answer = await client.post(f"/v1/models/{model}/preview", json=TEXT)
    assert answer.status_code == 200
    assert answer.json()["id"] == ADA and answer.json()["sample"] == "My dream is a sea."
    text, picture = world.catalogue.previews[f"{ADA}@abc123"]  # the revision that was drawn, whatever comes meanwhile
    assert text == "My dream is a sea." and picture == repr((ADA, [WEBP], text, "My dream is")).encode()
    [listed] = (await client.get("/v1/models?q=ada")).json()["data"]
    assert (listed["sample"], listed["names"]) == ("My dream is a sea.", {})


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text": "", "prompt": ""}, "text"),
        ({"text": " \n\t", "prompt": ""}, "text"),
        ({"text": "x" * 601, "prompt": "x"}, "text"),
        ({"text": "Your dream is big.", "prompt": "My dream is"}, "text"),
        ({"text": "My dream", "prompt": "My dream is"}, "text"),
        ({"text": 1, "prompt": ""}, "text"),
        ({"text": "My dream is"}, "prompt"),
        ({}, "text"),
    ],
)
async def test_a_text_that_cannot_stand_for_a_model_is_refused(
    client: httpx.AsyncClient, world: World, body: dict[str, object], param: str
) -> None:
    answer = await client.post(f"/v1/models/{ADA}/preview", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert not world.catalogue.previews


async def test_what_cannot_be_shown_otherwise_says_so(client: httpx.AsyncClient, world: World) -> None:
    assert (await client.post("/v1/models/fledgling/preview", json=TEXT)).status_code == 409
    for model in ("huggingtweets/nobody", "a%00", "%2e%2e%2fetc"):
        assert (await client.post(f"/v1/models/{model}/preview", json=TEXT)).status_code == 404
    async with client_of(world) as other:
        answer = await other.post(f"/v1/models/{ADA}/preview", json=TEXT)
        assert answer.status_code == 409 and "draws no pictures" in answer.json()["error"]["message"]
