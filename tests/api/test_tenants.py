"""Whose things are whose: two tenants of one server, by real keys, over a real store and a real job database."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from serve.api.access import Access
from serve.api.app import build_api
from serve.database.connection import Database
from serve.errors import NotOwner
from serve.keys.store import KeyStore
from serve.keys.table import KeyTable
from serve.store.revisions import Store
from serve.training.jobs.queue import JobQueue
from serve.training.jobs.store import JobStore
from serve.types import ALL_SEEING, Scope, Viewer, Visibility
from serve.web.router import add_pages
from tests.fakes.generator import EchoGenerator
from tests.fakes.memory import memory_draw_preview, memory_preview
from tests.fakes.models import write_tiny_gpt2

SECRET = b"of the server"
ADA, WREN, NOBODY = "huggingtweets/ada", "huggingtweets/wren", "huggingtweets/nobody"
ARCHIVE = "\n".join(json.dumps({"text": f"Today I saw {number} rooks in the old elm."}) for number in range(200))


class Town(NamedTuple):
    """One server, and a client of each caller."""

    store: Store
    generator: EchoGenerator
    jobs: JobStore
    queue: JobQueue
    ada: httpx.AsyncClient
    bob: httpx.AsyncClient
    operator: httpx.AsyncClient
    stranger: httpx.AsyncClient


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Database:
    return Database(f"sqlite:///{tmp_path_factory.mktemp('database') / 'rookery.db'}")


@pytest.fixture
async def town(tmp_path: Path, database: Database) -> AsyncIterator[Town]:
    table = KeyTable(database, SECRET)
    tenants = [Scope.GENERATE, Scope.READ, Scope.TRAIN]
    sent = [table.create(name, scopes=tenants, tenant=f"{name}-{tmp_path.name}")[1] for name in ("ada", "bob")]
    store = Store(tmp_path / "data", embedded={"fledgling": write_tiny_gpt2(tmp_path / "fledgling", seed=99)})
    jobs, generator = JobStore(database, tmp_path / "uploads", check_base=store.resolve), EchoGenerator()
    app = build_api(
        generator=generator,
        catalogue=store,
        files=jobs,
        jobs=jobs,
        upload_dir=tmp_path / "uploads",
        preview=memory_preview,
        draw_preview=memory_draw_preview,
        add_pages=add_pages,
        access=Access(KeyStore(database, SECRET, ["sk-operator"])),
    )

    def client(key: str) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://rookery", headers=headers)

    callers = [client(key) for key in (*sent, "sk-operator", "")]
    yield Town(store, generator, jobs, JobQueue(database), *callers)
    for caller in callers:
        await caller.aclose()


def tenant_of(town: Town, name: str, tmp_path: Path) -> Viewer:
    return Viewer(f"{name}-{tmp_path.name}")


def publish(store: Store, model_id: str, viewer: Viewer, visibility: Visibility = Visibility.PUBLIC) -> str:
    folder = write_tiny_gpt2(store.stage(), seed=len(model_id))
    (folder / "README.md").write_text("# A bot")
    (folder / "preview.png").write_bytes(b"picture")
    return store.publish(model_id, folder, viewer=viewer, visibility=visibility).revision


async def told(client: httpx.AsyncClient, model: str, revision: str) -> list[tuple[str, int, str, list[str]]]:
    """What each way to a model answers: the status, the text and the headers."""
    ways: list[tuple[str, str, dict[str, Any]]] = [
        *(
            ("GET", f"/v1/models/{model}{rest}", {})
            for rest in ("", "/versions", "/picture", "/avatar", f"@{revision}")
        ),
        *(("HEAD", f"/v1/models/{model}{rest}", {}) for rest in ("/picture", "/avatar")),
        *(
            ("GET", f"/api/models/{model}{rest}", {})
            for rest in ("", "/tree/main", "/refs", "/commits/main", "/likers")
        ),
        *(
            (method, f"/{model}/resolve/{name}/config.json", {})
            for method in ("GET", "HEAD")
            for name in ("main", revision)
        ),
        ("GET", f"/{model}/raw/main/README.md", {}),
        ("POST", f"/api/models/{model}/paths-info/main", {"json": {"paths": ["config.json"]}}),
        ("POST", f"/v1/models/{model}/rollback", {"json": {"revision": revision}}),
        ("POST", f"/v1/models/{model}/preview", {"json": {"text": "My dream", "prompt": "My"}}),
        ("POST", f"/v1/models/{model}/visibility", {"json": {"visibility": "public"}}),
        ("PUT", f"/api/models/{model}/settings", {"json": {"private": False}}),
        ("DELETE", f"/v1/models/{model}", {}),
        ("GET", f"/bots/{model}", {}),
        ("POST", f"/bots/{model}", {"data": {"do": "delete", "sure": "yes"}}),
    ]
    found = []
    for method, path, sent in ways:
        answer = await client.request(method, path, **sent)
        headers = sorted(name for name in answer.headers if name != "x-request-id")
        found.append((f"{method} {path}", answer.status_code, answer.text, headers))
    return found


async def test_anothers_private_model_is_not_there_by_any_way(town: Town, tmp_path: Path) -> None:
    revision = publish(town.store, ADA, tenant_of(town, "ada", tmp_path), Visibility.PRIVATE)
    publish(town.store, WREN, tenant_of(town, "ada", tmp_path))
    for client in (town.bob, town.stranger):
        hidden, missing = await told(client, ADA, revision), await told(client, NOBODY, revision)
        for there, not_there in zip(hidden, missing, strict=True):
            assert there[1] in (303, 401, 404) and "ada" not in there[2].replace(ADA, "")
            assert (there[1], there[2].replace(ADA, NOBODY), there[3]) == not_there[1:], there[0]
        for path in ("/v1/models", "/api/models", "/v1/models?q=ada", "/api/models?search=ada", "/?q=ada"):
            assert ADA not in (await client.get(path)).text.replace("q=ada", "")
    assert town.store.get_model(ADA).is_private and town.store.get_model(ADA).revision == revision
    for client in (town.ada, town.operator):
        assert (await client.get(f"/v1/models/{ADA}")).json()["visibility"] == "private"
        assert (
            ADA in (await client.get("/v1/models")).text
            and ADA in (await client.get("/api/models?sort=createdAt")).text
        )


async def test_an_unlisted_model_is_met_by_name_alone(town: Town, tmp_path: Path) -> None:
    publish(town.store, ADA, tenant_of(town, "ada", tmp_path), Visibility.UNLISTED)
    lists = ("/v1/models", "/v1/models?q=ada", "/api/models", "/api/models?search=ada&sort=createdAt", "/")
    for client, is_listed in ((town.ada, True), (town.operator, True), (town.bob, False), (town.stranger, False)):
        for path in lists:
            assert (ADA in (await client.get(path)).text) is is_listed
        for path in (f"/v1/models/{ADA}", f"/api/models/{ADA}", f"/{ADA}/resolve/main/README.md", f"/bots/{ADA}"):
            assert (await client.get(path)).status_code in (200, 307)
        page = (await client.get(f"/bots/{ADA}")).text
        assert 'content="noindex"' in page and ("Decide on it" in page) is is_listed


async def test_who_asks_goes_with_each_text(town: Town, tmp_path: Path) -> None:
    body = {"model": ADA, "prompt": "My dream"}
    for client in (town.ada, town.bob, town.operator, town.stranger):
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        assert (await client.post(f"/models/{ADA}", json={"inputs": "My dream"})).status_code == 200
    asked = [request.viewer for request in town.generator.requests]
    ada, bob = tenant_of(town, "ada", tmp_path), tenant_of(town, "bob", tmp_path)
    assert asked == [ada, ada, bob, bob, *[Viewer("operator", sees_all=True)] * 2, Viewer(), Viewer()]
    names = [request.caller for request in town.generator.requests]
    assert len(set(names)) == 4 and names[-1] == ""


async def test_anothers_public_model_is_read_and_not_changed(town: Town, tmp_path: Path) -> None:
    ada = tenant_of(town, "ada", tmp_path)
    revision = publish(town.store, ADA, ada)
    town.store.import_folder(town.store.locate(ADA).path, "org/imported")  # nobody's
    before = town.store.get_model(ADA)
    for model in (ADA, "org/imported"):
        answers = {way: (status, text) for way, status, text, _ in await told(town.bob, model, revision)}
        for way, (status, text) in answers.items():
            is_change = way.split()[0] in ("PUT", "DELETE") or way.endswith(("rollback", "preview", "visibility"))
            is_change = is_change or way == f"POST /bots/{model}"
            assert status == 403 if is_change else status in (200, 307, 404), way
            assert not is_change or "somebody else's" in unescape(text)
    assert town.store.get_model(ADA) == before
    assert (await town.ada.post(f"/v1/models/{ADA}/visibility", json={"visibility": "unlisted"})).status_code == 200
    assert town.store.get_model(ADA).visibility is Visibility.UNLISTED
    assert (await town.ada.delete(f"/v1/models/{ADA}")).status_code == 200
    assert (await town.operator.delete("/v1/models/org/imported")).status_code == 200


async def test_files_and_jobs_are_their_tenants_alone(town: Town) -> None:
    upload = {"file": ("ada.jsonl", ARCHIVE.encode())}
    file = (await town.ada.post("/v1/files", files=upload)).json()["id"]
    wanted = {"model": "fledgling", "training_file": file, "handle": "ada", "visibility": "private"}
    job = (await town.ada.post("/v1/fine_tuning/jobs", json=wanted)).json()
    assert job.get("visibility") == "private", job
    things = [f"/v1/files/{file}", f"/v1/files/{file}/content", *(f"/jobs/{job['id']}",)]
    things += [f"/v1/fine_tuning/jobs/{job['id']}{rest}" for rest in ("", "/events", "/checkpoints", "/runs")]
    for path in things:
        assert [(await client.get(path)).status_code for client in (town.ada, town.operator)] == [200, 200]
        hidden, missing = (
            await town.bob.get(path),
            await town.bob.get(path.replace(file, "file-x").replace(job["id"], "ftjob-x")),
        )
        assert hidden.status_code == missing.status_code == 404
        assert hidden.text.replace(file, "file-x").replace(job["id"], "ftjob-x") == missing.text
    changes = [("DELETE", f"/v1/files/{file}"), ("POST", f"/jobs/{job['id']}")]
    changes += [("POST", f"/v1/fine_tuning/jobs/{job['id']}/{act}") for act in ("cancel", "pause", "resume")]
    for method, path in changes:
        assert (await town.bob.request(method, path, data={"do": "cancel"})).status_code == 404
    stolen = await town.bob.post("/v1/fine_tuning/jobs", json={**wanted, "handle": "bob"})
    assert stolen.status_code == 404 and stolen.json()["error"]["param"] == "training_file"
    assert (await town.bob.get(f"/make/review?file={file}&handle=ada")).status_code == 404
    for path in ("/v1/files", "/v1/fine_tuning/jobs", "/jobs"):
        listed = [(await client.get(path)).text for client in (town.ada, town.operator, town.bob)]
        assert [job["id"] in text or file in text for text in listed] == [True, True, False]
        assert (await town.stranger.get(path)).status_code in (303, 401)
    for path, last in (("/v1/files", file), ("/v1/fine_tuning/jobs", job["id"])):  # nor does a cursor tell of it
        assert (await town.bob.get(f"{path}?after={last}")).status_code == 404
    assert town.jobs.get_job(job["id"]).status == "queued"
    assert (await town.ada.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")).status_code == 200


def test_a_base_that_is_not_theirs_is_not_there(town: Town, tmp_path: Path) -> None:
    publish(town.store, ADA, tenant_of(town, "ada", tmp_path), Visibility.PRIVATE)
    assert town.store.resolve(ADA, tenant_of(town, "ada", tmp_path))
    for viewer in (tenant_of(town, "bob", tmp_path), Viewer()):
        with pytest.raises(Exception, match=f"'{ADA}' is not here") as hidden:
            town.store.resolve(ADA, viewer)
        assert hidden.value.__class__.__name__ == "ModelNotFound"


def test_a_name_that_is_taken_is_nobody_elses(town: Town, tmp_path: Path) -> None:
    ada, bob = tenant_of(town, "ada", tmp_path), tenant_of(town, "bob", tmp_path)
    publish(town.store, ADA, ada)
    town.store.import_folder(town.store.locate(ADA).path, "org/imported")
    for model in (ADA, ADA.upper().replace("HUGGINGTWEETS", "huggingtweets"), "org/imported"):
        with pytest.raises(NotOwner, match="is taken"):
            publish(town.store, model, bob)
    publish(town.store, ADA, ALL_SEEING)  # who may do everything may do that, and it stays hers
    assert town.store.get_model(ADA).owner == ada.tenant
    town.store.delete_model(ADA, ada)
    publish(town.store, ADA, bob)
    assert town.store.get_model(ADA).owner == bob.tenant


def test_a_name_is_free_again_when_nothing_came_of_it(town: Town, tmp_path: Path) -> None:
    ada, bob = tenant_of(town, "ada", tmp_path), tenant_of(town, "bob", tmp_path)
    folder = write_tiny_gpt2(town.store.stage())
    (folder / "rookery.json").write_text(json.dumps({"checkpoint_step": 3}))
    town.store.publish(ADA, folder, alias=None, viewer=ada, visibility=Visibility.PRIVATE)
    with pytest.raises(NotOwner):
        town.store.check_name(ADA, bob)
    assert town.store.drop_checkpoints(ADA)
    town.store.check_name(ADA, bob)
    publish(town.store, ADA, bob)
    assert town.store.get_model(ADA).visibility is Visibility.PUBLIC
