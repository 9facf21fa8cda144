"""Where keys are set: what each route of the application asks of its callers."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.routing import iter_route_contexts

from serve.api.access import Access
from serve.api.app import build_api
from tests.fakes.generator import EchoGenerator
from tests.fakes.memory import MemoryCatalogue, MemoryFiles, MemoryJobs, memory_preview

ADA = "huggingtweets/ada"
KEY = "key-of-ours"
WITH_KEY = {"authorization": f"Bearer {KEY}"}
STRANGERS: tuple[dict[str, str], ...] = ({}, {"authorization": "Bearer hf_of-somebody-else"})
HUB = "/api/models/{model:path}"

# Every route is in one of these: reading public models, and having texts written by them, is free.
FREE = {
    ("GET", "/openapi.json"),
    ("HEAD", "/openapi.json"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/v1/status"),  # without a key only what /readyz says
    ("GET", "/info"),
    ("POST", "/"),
    ("POST", "/generate"),
    ("POST", "/generate_stream"),
    ("POST", "/models/{model:path}"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/archives/preview"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model:path}"),
    ("GET", "/v1/models/{model:path}/versions"),
    ("GET", "/v1/models/{model:path}/picture"),
    ("GET", "/v1/models/{model:path}/avatar"),
    ("HEAD", "/v1/models/{model:path}/picture"),
    ("HEAD", "/v1/models/{model:path}/avatar"),
    ("GET", "/api/models"),
    ("GET", "/api/models-tags-by-type"),
    ("GET", "/api/datasets"),
    ("GET", "/api/datasets/{rest:path}"),
    ("GET", "/api/spaces"),
    ("GET", "/api/spaces/{rest:path}"),
    ("GET", "/api/kernels"),
    ("GET", "/api/kernels/{rest:path}"),
    ("GET", HUB),
    ("GET", f"{HUB}/{{word}}"),
    ("GET", f"{HUB}/tree/{{rest:path}}"),
    ("POST", f"{HUB}/paths-info/{{revision:path}}"),
    ("GET", f"{HUB}/refs"),
    ("GET", f"{HUB}/commits/{{revision:path}}"),
    ("GET", f"{HUB}/discussions/{{number:int}}"),
    ("GET", "/{model:path}/resolve/{rest:path}"),
    ("HEAD", "/{model:path}/resolve/{rest:path}"),
    ("GET", "/{model:path}/raw/{rest:path}"),
    ("HEAD", "/{model:path}/raw/{rest:path}"),
    *((method, "/api/{rest:path}") for method in ("POST", "PUT", "PATCH", "DELETE")),  # refuse everybody
    ("POST", "/{model:path}.git/{rest:path}"),
}
KEY_NEEDED = {
    ("POST", "/v1/models/{model:path}/rollback"),
    ("POST", "/v1/models/{model:path}/preview"),
    ("POST", "/v1/models/{model:path}/pull"),
    ("DELETE", "/v1/models/{model:path}"),
    ("PUT", f"{HUB}/settings"),
    ("GET", "/api/whoami-v2"),
    ("GET", "/v1/residents"),
    ("GET", "/v1/replicas"),
    ("GET", "/v1/top"),
    ("POST", "/v1/bots"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/{file_id}"),
    ("GET", "/v1/files/{file_id}/content"),
    ("DELETE", "/v1/files/{file_id}"),
    ("POST", "/v1/fine_tuning/jobs"),
    ("GET", "/v1/fine_tuning/jobs"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/runs"),
}


def app_with(folder: Path, catalogue: MemoryCatalogue, *keys: str, hosts: str = "") -> FastAPI:
    files = MemoryFiles(folder / "files")
    return build_api(
        generator=EchoGenerator(),
        catalogue=catalogue,
        files=files,
        jobs=MemoryJobs(files),
        upload_dir=folder / "uploads",
        preview=memory_preview,
        access=Access.from_setting(",".join(keys), hosts),
    )


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://rookery")


def address(path: str, model: str = ADA) -> str:
    for name, value in [("model:path", model), ("rest:path", "main"), ("revision:path", "main"), ("number:int", "1")]:
        path = path.replace(f"{{{name}}}", value)
    return path.format(word="likers", file_id="file-0", job_id="ftjob-0")


def is_refused(answer: httpx.Response) -> bool:
    """For want of a key, not as the Hub refuses what is not there."""
    return answer.status_code == 401 and "x-error-code" not in answer.headers


def test_of_every_route_it_is_decided_who_may_use_it(tmp_path: Path) -> None:
    app = app_with(tmp_path, MemoryCatalogue("fledgling", ADA))
    routes = {(method, one.path) for one in iter_route_contexts(app.routes) for method in one.methods or ()}
    assert routes == FREE | KEY_NEEDED and not FREE & KEY_NEEDED


@pytest.mark.parametrize(("method", "path"), sorted(FREE | KEY_NEEDED))
async def test_a_key_is_asked_for_where_it_is_needed(tmp_path: Path, method: str, path: str) -> None:
    async with client_of(app_with(tmp_path, MemoryCatalogue("fledgling", ADA), KEY)) as client:
        for headers in STRANGERS:
            answer = await client.request(method, address(path), headers=headers)
            assert is_refused(answer) is ((method, path) in KEY_NEEDED)
            if is_refused(answer):
                assert answer.headers["www-authenticate"] == "Bearer"
        assert (await client.request(method, address(path), headers=WITH_KEY)).status_code != 401


@pytest.mark.parametrize(("method", "path"), sorted(KEY_NEEDED - {("GET", "/api/whoami-v2")}))
async def test_where_no_keys_are_set_none_is_asked_for(tmp_path: Path, method: str, path: str) -> None:
    async with client_of(app_with(tmp_path, MemoryCatalogue("fledgling", ADA))) as client:
        assert (await client.request(method, address(path))).status_code != 401


async def test_a_refusal_has_the_shape_that_callers_of_its_route_know(tmp_path: Path) -> None:
    async with client_of(app_with(tmp_path, MemoryCatalogue(ADA), KEY)) as client:
        ours = (await client.get("/v1/residents")).json()["error"]
        assert (ours["code"], ours["type"]) == ("invalid_api_key", "invalid_request_error")
        hubs = await client.put(f"/api/models/{ADA}/settings", json={"private": True})
        assert hubs.json() == {"error": hubs.headers["x-error-message"]}


@pytest.mark.parametrize(("method", "path"), sorted(one for one in FREE | KEY_NEEDED if "{model" in one[1]))
async def test_a_private_model_is_to_strangers_like_one_that_is_not_there(
    tmp_path: Path, method: str, path: str
) -> None:
    catalogue = MemoryCatalogue("fledgling", "huggingtweets/secret")
    catalogue.set_private("huggingtweets/secret", True)
    app = app_with(tmp_path, catalogue, KEY)
    async with client_of(app) as client:
        for headers in STRANGERS:
            asked = [address(path, f"huggingtweets/{name}") for name in ("secret", "nobody")]
            hidden, missing = [await client.request(method, one, headers=headers, json={}) for one in asked]
            assert hidden.status_code == missing.status_code
            assert hidden.text.replace("secret", "nobody") == missing.text
            assert set(hidden.headers) == set(missing.headers)


async def test_the_name_of_a_private_base_is_for_callers_with_a_key(tmp_path: Path) -> None:
    catalogue = MemoryCatalogue("fledgling")
    catalogue.models["fledgling"] = replace(catalogue.models["fledgling"], is_private=True)
    async with client_of(app_with(tmp_path, catalogue, KEY)) as client:
        hidden = await client.get("/info")
        assert hidden.status_code == 404 and "fledgling" not in hidden.text
        assert (await client.get("/info", headers=WITH_KEY)).json()["model_id"] == "fledgling"


# --- Names ----------------------------------------------------------------------------------------------------

OURS = [
    "localhost",
    "LocalHost:8000",
    "localhost.",
    "127.0.0.1:8000",
    "10.1.2.3",
    "[::1]:8000",
    "[::1]",
    "birds.example:80",
]
NOT_OURS = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "birds.example.evil",
    "127.0.0.1.evil.example",
]
NO_NAMES = ["[", "[localhost]", "localhost:x", "a:b:c", "0x7f.1", "ü", ":80", " "]


@pytest.mark.parametrize("host", OURS)
async def test_a_server_answers_to_its_addresses_and_to_its_names(tmp_path: Path, host: str) -> None:
    async with client_of(app_with(tmp_path, MemoryCatalogue(ADA), hosts="Birds.example, rookery")) as client:
        assert (await client.get("/v1/models", headers={"host": host})).status_code == 200


@pytest.mark.parametrize("host", [*NOT_OURS, *NO_NAMES])
async def test_a_name_that_is_not_ours_is_refused_whatever_is_asked(tmp_path: Path, host: str) -> None:
    headers = [(b"host", host.encode())]
    async with client_of(app_with(tmp_path, MemoryCatalogue(ADA), hosts="birds.example")) as client:
        for method, path in (("HEAD", "/openapi.json"), ("POST", "/v1/completions"), ("GET", "/nowhere")):
            assert (await client.request(method, path, headers=headers)).status_code == 403
        error = (await client.get("/v1/models", headers=headers)).json()["error"]
        assert error["code"] == "unknown_host" and "ROOKERY_HOSTS" in error["message"]


@pytest.mark.parametrize("host", [*OURS, *NOT_OURS, *NO_NAMES])
async def test_where_no_names_are_set_any_will_do(tmp_path: Path, host: str) -> None:
    async with client_of(app_with(tmp_path, MemoryCatalogue(ADA))) as client:
        assert (await client.get("/v1/models", headers=[(b"host", host.encode())])).status_code == 200


@pytest.mark.parametrize("host", ["", None])
async def test_a_probe_that_names_no_host_is_answered(tmp_path: Path, host: str | None) -> None:
    async with client_of(app_with(tmp_path, MemoryCatalogue(ADA), hosts="birds.example")) as client:
        request = client.build_request("GET", "/healthz", headers={"host": host or ""})
        if host is None:
            del request.headers["host"]
        assert (await client.send(request)).status_code == 200


@pytest.mark.parametrize("host", ["", "["])
@pytest.mark.parametrize("origin", ["http://[", "null", "", "http://"])
async def test_an_origin_that_is_none_is_of_another_site(tmp_path: Path, host: str, origin: str) -> None:
    async with client_of(app_with(tmp_path, MemoryCatalogue(ADA))) as client:
        answer = await client.post("/v1/completions", headers={"origin": origin, "host": host})
        assert answer.json()["error"]["code"] == "cross_site_request"


def test_a_caller_has_a_name_that_only_a_key_of_ours_gives() -> None:
    def name(key: str, *keys: str) -> str:
        headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
        scope = {"type": "http", "headers": headers, "server": ("rookery", 80), "path": "/", "scheme": "http"}
        return Access(keys).caller_of(Request(scope))

    assert name("sk-ada", "sk-ada") == name("sk-ada", "sk-bob", "sk-ada") != name("sk-bob", "sk-bob", "sk-ada") != ""
    assert name("sk-other", "sk-ada") == name("", "sk-ada") == name("") == ""  # nobody may fill the list of callers
    assert len(name("sk-ada")) == len(name("sk-ada", "sk-ada")) == 16
    quick = blake2b(b"sk-ada", digest_size=8).hexdigest()
    assert name("sk-ada", "sk-ada") != quick  # which would tell at once whether a guess is right
