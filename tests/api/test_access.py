"""Where there are keys: what each route of the application asks of its callers."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.routing import iter_route_contexts

from serve.api.access import FREE, Access
from serve.api.app import build_api
from serve.settings import BadSetting
from serve.types import Scope, Visibility
from serve.web.router import add_pages
from tests.fakes.generator import EchoGenerator
from tests.fakes.keys import MemoryKeys
from tests.fakes.memory import MemoryCatalogue, MemoryFiles, MemoryJobs, memory_preview

ADA = "huggingtweets/ada"
KEY = "key-of-ours"
WITH_KEY = {"authorization": f"Bearer {KEY}"}
STRANGERS: tuple[dict[str, str], ...] = ({}, {"authorization": "Bearer hf_of-somebody-else"})
MODEL, HUB, FILE = "/v1/models/{model:path}", "/api/models/{model:path}", "/v1/files/{file_id}"
JOBS, JOB = "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/{job_id}"

# Every route is in one of these, by what it takes: nothing, one of the scopes, or any key.
OPEN = {
    *("GET /openapi.json", "HEAD /openapi.json", "GET /healthz", "GET /health", "GET /readyz"),
    *("GET /login", "HEAD /login", "POST /login", "POST /logout"),
    *("GET /static/{digest}/{name}", "HEAD /static/{digest}/{name}", "GET /favicon.ico", "HEAD /favicon.ico"),
}
READ = {
    *("GET /v1/status", "GET /info"),  # without an admin's key the status says what /readyz says
    *("GET /v1/models", f"GET {MODEL}", f"GET {MODEL}/versions"),
    *(f"{method} {MODEL}/{image}" for method in ("GET", "HEAD") for image in ("picture", "avatar")),
    *("GET /", "HEAD /", "GET /bots/{model:path}", "HEAD /bots/{model:path}"),
    *("GET /api/models", "GET /api/models-tags-by-type"),
    *(f"GET /api/{kind}{rest}" for kind in ("datasets", "spaces", "kernels") for rest in ("", "/{rest:path}")),
    *(f"GET {HUB}", f"GET {HUB}/{{word}}", f"GET {HUB}/tree/{{rest:path}}", f"GET {HUB}/refs"),
    *(f"POST {HUB}/paths-info/{{revision:path}}", f"GET {HUB}/commits/{{revision:path}}"),
    f"GET {HUB}/discussions/{{number:int}}",
    *(f"{method} /{{model:path}}/{how}/{{rest:path}}" for method in ("GET", "HEAD") for how in ("resolve", "raw")),
    *(f"{method} /api/{{rest:path}}" for method in ("POST", "PUT", "PATCH", "DELETE")),  # refuse everybody
    "POST /{model:path}.git/{rest:path}",
}
OWN = {  # read by a key alone
    *("GET /v1/files", f"GET {FILE}", f"GET {FILE}/content"),
    *(f"GET {JOBS}", f"GET {JOB}", f"GET {JOB}/events", f"GET {JOB}/checkpoints", f"GET {JOB}/runs"),
    *("GET /jobs", "HEAD /jobs", "GET /jobs/{job_id}", "HEAD /jobs/{job_id}"),
}
GENERATE = {
    *("POST /v1/completions", "POST /generate", "POST /generate_stream", "POST /", "POST /models/{model:path}"),
}
TRAIN = {
    *("POST /v1/files", f"DELETE {FILE}", "POST /v1/bots", "POST /v1/archives/preview"),
    *(f"POST {JOBS}", f"POST {JOB}/cancel", f"POST {JOB}/pause", f"POST {JOB}/resume", "POST /jobs/{job_id}"),
    *(f"POST {MODEL}/{change}" for change in ("preview", "rollback", "visibility")),
    *(f"DELETE {MODEL}", f"PUT {HUB}/settings", "POST /v1/erasures", "GET /v1/erasures/{erasure_id}"),
    *(f"{method} /make{page}" for method in ("GET", "HEAD", "POST") for page in ("", "/review")),
}
ADMIN = {
    *("GET /metrics", "GET /v1/residents", "GET /v1/replicas", "GET /v1/top", f"POST {MODEL}/pull"),
    *(f"{method} /admin{page}" for method in ("GET", "HEAD") for page in ("", "/top")),
    *(f"POST {MODEL}/disable", f"POST {MODEL}/enable"),
    "POST /v1/erasures/lift",
}
WRITE_OR_DECIDE = {"POST /bots/{model:path}"}  # what is wanted is in the body
ANY_KEY = {"GET /api/whoami-v2"}
GROUPS: list[tuple[set[str], frozenset[Scope]]] = [
    (OPEN, frozenset()),
    (READ, frozenset({Scope.READ})),
    (OWN, frozenset({Scope.READ})),
    (GENERATE, frozenset({Scope.GENERATE})),
    (TRAIN, frozenset({Scope.TRAIN})),
    (ADMIN, frozenset({Scope.ADMIN})),
    (WRITE_OR_DECIDE, frozenset({Scope.GENERATE, Scope.TRAIN})),
    (ANY_KEY, frozenset(Scope)),
]
SCOPES = {route: scopes for group, scopes in GROUPS for route in group}


def app_with(
    folder: Path, catalogue: MemoryCatalogue, *keys: str, hosts: str = "", anonymous: str = ",".join(FREE)
) -> FastAPI:
    known = MemoryKeys(*keys)
    for scope in Scope if keys else ():
        known.add(f"may-{scope}", "birds", [scope])
    files = MemoryFiles(folder / "files")
    return build_api(
        generator=EchoGenerator(),
        catalogue=catalogue,
        files=files,
        jobs=MemoryJobs(files),
        upload_dir=folder / "uploads",
        preview=memory_preview,
        add_pages=add_pages,
        access=Access.from_settings(known, hosts=hosts, anonymous=anonymous),
    )


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://rookery")


def address(path: str, model: str = ADA) -> str:
    for name, value in [("model:path", model), ("rest:path", "main"), ("revision:path", "main"), ("number:int", "1")]:
        path = path.replace(f"{{{name}}}", value)
    filled = {"word": "likers", "file_id": "file-0", "job_id": "ftjob-0", "erasure_id": "erasure-0"}
    return path.format(**filled, digest="0", name="app.css")


def wants_key(answer: httpx.Response) -> bool:
    """It is refused for want of a key, not as the Hub refuses what is not there; pages show where to sign in."""
    is_sent_on = answer.status_code == 303 and answer.headers["location"].startswith("/login?")
    return is_sent_on or (answer.status_code == 401 and "x-error-code" not in answer.headers)


def wants_scope(answer: httpx.Response) -> bool:
    """It is refused for what the key may not do."""
    return answer.status_code == 403 and "insufficient_scope" in answer.headers.get("www-authenticate", "")


async def asked(
    client: httpx.AsyncClient, key: str = "", but: frozenset[str] = frozenset()
) -> list[tuple[str, httpx.Response]]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    found = []
    for route in sorted(SCOPES.keys() - but):
        method, path = route.split(" ")
        found.append((route, await client.request(method, address(path), headers=headers)))
    return found


def test_of_every_route_it_is_decided_who_may_use_it(tmp_path: Path) -> None:
    app = app_with(tmp_path, MemoryCatalogue("fledgling", ADA))
    routes = {f"{method} {one.path}" for one in iter_route_contexts(app.routes) for method in one.methods or ()}
    assert routes == SCOPES.keys() and sum(len(group) for group, _ in GROUPS) == len(SCOPES)


async def test_where_callers_without_a_key_may_do_nothing_every_route_asks_for_one(tmp_path: Path) -> None:
    async with client_of(app_with(tmp_path, MemoryCatalogue("fledgling", ADA), KEY, anonymous="")) as client:
        for key in ("", "hf_of-somebody-else"):
            assert {route for route, answer in await asked(client, key) if not wants_key(answer)} == OPEN


@pytest.mark.parametrize("scope", Scope)
async def test_a_key_opens_what_its_scope_says_and_nothing_else(tmp_path: Path, scope: Scope) -> None:
    async with client_of(app_with(tmp_path, MemoryCatalogue("fledgling", ADA), KEY)) as client:
        answers = dict(await asked(client, f"may-{scope}"))
    shut = {route for route, answer in answers.items() if wants_scope(answer)}
    may_all = scope is Scope.ADMIN
    assert shut == {route for route, scopes in SCOPES.items() if scopes and not may_all and scope not in scopes}
    assert not any(map(wants_key, answers.values()))


async def test_without_a_key_what_is_public_is_read_and_has_texts_written(tmp_path: Path) -> None:
    async with client_of(app_with(tmp_path, MemoryCatalogue("fledgling", ADA), KEY)) as client:
        for key in ("", "hf_of-somebody-else"):
            free = {route for route, answer in await asked(client, key) if not wants_key(answer)}
            assert free == OPEN | READ | GENERATE | WRITE_OR_DECIDE


async def test_where_there_are_no_keys_none_is_asked_for(tmp_path: Path) -> None:
    async with client_of(app_with(tmp_path, MemoryCatalogue("fledgling", ADA))) as client:
        answers = await asked(client, but=frozenset(ANY_KEY))
        assert not [route for route, answer in answers if wants_key(answer) or wants_scope(answer)]


@pytest.mark.parametrize("anonymous", ["train", "generate,admin", "generate read", "all"])
def test_callers_without_a_key_change_nothing_whatever_is_set(anonymous: str) -> None:
    with pytest.raises(BadSetting, match="ROOKERY_ANONYMOUS"):
        Access.from_settings(MemoryKeys(KEY), hosts="", anonymous=anonymous)


async def test_a_refusal_says_what_is_missing_in_the_shape_that_callers_know(tmp_path: Path) -> None:
    async with client_of(app_with(tmp_path, MemoryCatalogue(ADA), KEY)) as client:
        refused = await client.get("/v1/residents")
        ours = refused.json()["error"]
        assert (ours["code"], ours["type"]) == ("invalid_api_key", "invalid_request_error")
        assert refused.headers["www-authenticate"] == "Bearer"
        hubs = await client.put(f"/api/models/{ADA}/settings", json={"private": True})
        assert hubs.status_code == 401 and hubs.json() == {"error": hubs.headers["x-error-message"]}
        shut = await client.post("/v1/bots", headers={"authorization": "Bearer may-read"})
        error = shut.json()["error"]
        assert (shut.status_code, error["code"]) == (403, "insufficient_scope")
        assert "'train'" in error["message"] and "'read'" in error["message"]
        assert shut.headers["www-authenticate"] == 'Bearer error="insufficient_scope", scope="train"'


async def test_the_page_that_comes_with_texts_is_for_those_who_may_read_it(tmp_path: Path) -> None:
    app = app_with(tmp_path, MemoryCatalogue(ADA), KEY, anonymous="generate")
    form = {"do": "write", "prompt": "My dream", "n": "1", "max_tokens": "8"}
    async with client_of(app) as client:
        shut = await client.post(f"/bots/{ADA}", data=form, headers={"authorization": "Bearer may-generate"})
        assert wants_scope(shut) and 'scope="read"' in shut.headers["www-authenticate"]
        assert wants_key(await client.post(f"/bots/{ADA}", data=form))
        shut = await client.post(f"/bots/{ADA}", data=form, headers={"authorization": "Bearer may-read"})
        assert wants_scope(shut)
        assert (await client.post(f"/bots/{ADA}", data=form, headers=WITH_KEY)).status_code == 200


@pytest.mark.parametrize("query", ["key=", "api_key=", "API_KEY=", "a=b&access_token="])
async def test_a_key_in_the_address_is_refused_and_not_repeated(tmp_path: Path, query: str) -> None:
    async with client_of(app_with(tmp_path, MemoryCatalogue(ADA), KEY)) as client:
        for path in ("/v1/models", "/healthz", "/", "/generate", "/nowhere"):
            answer = await client.get(f"{path}?{query}{KEY}", headers=WITH_KEY)
            assert answer.status_code == 400 and KEY not in answer.text
            assert "Authorization: Bearer" in answer.text
        named = await client.get("/v1/models", headers={**WITH_KEY, "host": f"{KEY}@rookery"})
        assert named.status_code == 400
        assert (await client.get("/v1/models?q=key")).status_code == 200


@pytest.mark.parametrize("route", sorted(route for route in SCOPES if "{model" in route))
async def test_a_private_model_is_to_strangers_like_one_that_is_not_there(tmp_path: Path, route: str) -> None:
    method, path = route.split(" ")
    catalogue = MemoryCatalogue("fledgling", "huggingtweets/secret")
    catalogue.set_visibility("huggingtweets/secret", Visibility.PRIVATE)
    async with client_of(app_with(tmp_path, catalogue, KEY)) as client:
        for headers in (*STRANGERS, *({"authorization": f"Bearer may-{scope}"} for scope in ("read", "train"))):
            asked = [address(path, f"huggingtweets/{name}") for name in ("secret", "nobody")]
            hidden, missing = [await client.request(method, one, headers=headers, json={}) for one in asked]
            assert hidden.status_code == missing.status_code
            assert hidden.text.replace("secret", "nobody") == missing.text
            assert set(hidden.headers) == set(missing.headers)


async def test_the_name_of_a_private_base_is_for_callers_with_a_key(tmp_path: Path) -> None:
    catalogue = MemoryCatalogue("fledgling")
    catalogue.models["fledgling"] = replace(catalogue.models["fledgling"], visibility=Visibility.PRIVATE)
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
        return Access(MemoryKeys(*keys)).caller(Request(scope)).name

    assert name("sk-ada", "sk-ada", "sk-bob") != name("sk-bob", "sk-ada", "sk-bob") != ""
    assert name("sk-other", "sk-ada") == name("", "sk-ada") == name("") == ""  # nobody may fill the list of callers
    assert name("sk-ada") == blake2b(b"sk-ada", digest_size=8).hexdigest()  # where no key is worth guessing
