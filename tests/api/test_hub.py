"""The Hub's read API over a real store behind a real server: its bytes and headers, and the real clients."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest
from fastapi import Request

from serve.api.access import Access
from serve.api.app import build_api
from serve.store.opening import EMBEDDED
from serve.store.revisions import Store
from tests.api.conftest import LIMITS, Server
from tests.fakes.generator import EchoGenerator
from tests.fakes.memory import MemoryFiles, MemoryJobs
from tests.fakes.models import write_tiny_gpt2
from tests.hub.clients import check_clients, pipeline_word_for_word, run_apart

MODEL = "huggingtweets/ada"
KEY = "key-of-ours"
WITH_KEY = {"authorization": f"Bearer {KEY}"}
STRANGER = {"authorization": "Bearer hf_of-somebody-else"}
CARD = """\
---
language: en
license: mit
tags:
- huggingtweets
widget:
- text: "My dream is"
---

# Ada
"""


@dataclass
class Hub:
    """A store, and the service over it."""

    store: Store
    generator: EchoGenerator
    url: str
    folder: Path

    def publish(
        self, model_id: str = MODEL, *, seed: int = 0, card: str = CARD, n_embd: int = 32, n_positions: int = 64
    ) -> str:
        """Another version; its revision."""
        staged = self.store.stage()
        write_tiny_gpt2(staged, seed=seed, n_embd=n_embd, n_positions=n_positions)
        (staged / "README.md").write_text(card)
        (staged / "runs").mkdir()
        (staged / "runs" / "train.json").write_text("{}")
        (staged / "predictions.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
        (staged / "rookery.json").write_text(
            json.dumps({"created_at": 1_700_000_000 + seed, "tags": ["huggingtweets"]})
        )
        return self.store.publish(model_id, staged).revision

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers={key.replace("_", "-"): value for key, value in headers.items()})


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    store = Store(tmp_path / "data", embedded=EMBEDDED)
    files, generator = MemoryFiles(tmp_path / "files"), EchoGenerator()
    app = build_api(
        generator=generator,
        catalogue=store,
        files=files,
        jobs=MemoryJobs(files),
        upload_dir=tmp_path / "uploads",
        limits=LIMITS,
        access=Access([KEY]),
    )
    server = Server(app)
    thread = threading.Thread(target=server.serve_for_ever)
    thread.start()
    assert server.is_up.wait(10)
    yield Hub(store, generator, server.url, tmp_path)
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


# --- The real clients -------------------------------------------------------------------------------------


def test_all_calls_of_the_real_clients_work(hub: Hub) -> None:
    hub.publish(seed=1)
    hub.publish(seed=2)
    passed = check_clients(hub.url, MODEL, token=KEY)
    assert all(passed.values()), [name for name, has_passed in passed.items() if not has_passed]
    assert len(passed) >= 33


def test_the_three_lines_of_a_card_work_word_for_word(hub: Hub) -> None:
    hub.publish(n_positions=1024)  # the pipeline writes up to 256 tokens
    assert pipeline_word_for_word(hub.url, MODEL)


def test_a_model_without_a_namespace_works_too(hub: Hub) -> None:
    assert all(check_clients(hub.url, "fledgling", names=("repo_exists", "file_exists", "snapshot_download")).values())


def test_a_client_gets_the_version_that_was_published_since(hub: Hub, tmp_path: Path) -> None:
    names = "from huggingface_hub import hf_hub_download as get; import pathlib; print(pathlib.Path(get('{}', '{}')))"
    code = names.format(MODEL, "model.safetensors")
    paths = []
    for seed in (1, 2):
        revision = hub.publish(seed=seed)
        done = run_apart(["-c", code], hub.url, tmp_path)
        assert revision in done.stdout, done.stderr
        paths.append(Path(done.stdout.strip()).read_bytes())
    assert paths[0] != paths[1]


def test_the_list_is_read_over_several_pages(hub: Hub, tmp_path: Path) -> None:
    hub.publish()
    source = hub.store.resolve(MODEL).path
    for number in range(120):
        home = hub.folder / "data" / "models" / "many" / f"bot{number:03}"
        home.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (home / name).hardlink_to(source / name)
    code = "from huggingface_hub import list_models as ls; print([m.id for m in ls(author='many', full=True)])"
    done = run_apart(["-c", code], hub.url, tmp_path)
    assert eval(done.stdout) == [f"many/bot{number:03}" for number in range(120)], done.stderr


def test_a_download_that_breaks_off_is_resumed(hub: Hub, tmp_path: Path) -> None:
    hub.publish(n_embd=512)  # 26 MB: the client writes 10 MB at a time
    with Cutter(hub.url, after_bytes=15_000_000) as cutter:
        code = f"from huggingface_hub import hf_hub_download as get; print(get('{MODEL}', 'model.safetensors'))"
        done = run_apart(["-c", code], cutter.url, tmp_path)
    assert done.returncode == 0, done.stderr
    content = (hub.store.resolve(MODEL).path / "model.safetensors").read_bytes()
    assert Path(done.stdout.strip()).read_bytes() == content
    assert cutter.ranges == [f"bytes={10 << 20}-"]


class Cutter:
    """A line that breaks once, in the middle of the first large answer; `ranges`: what was asked for afterwards."""

    def __init__(self, url: str, after_bytes: int) -> None:
        self._target = httpx.URL(url)
        self._after_bytes = after_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.ranges: list[str] = []
        self._has_cut = False
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Cutter:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    def _start(self, function: object, *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection((self._target.host, self._target.port or 80))
        self._start(self._carry_up, client, server)
        sent = 0
        while data := server.recv(65536):
            sent += len(data)
            if sent > self._after_bytes and not self._has_cut:
                self._has_cut = True
                break
            client.sendall(data)
        for one in (client, server):
            one.shutdown(socket.SHUT_RDWR) if one.fileno() >= 0 else None
        client.close()

    def _carry_up(self, client: socket.socket, server: socket.socket) -> None:
        try:
            while data := client.recv(65536):
                if self._has_cut:
                    lines = data.decode("latin-1").split("\r\n")
                    self.ranges += [line.split(": ", 1)[1] for line in lines if line.lower().startswith("range:")]
                server.sendall(data)
        except OSError:
            pass
        finally:
            server.close()


# --- Bytes and headers ------------------------------------------------------------------------------------


def test_a_file_comes_with_what_clients_need_to_keep_it(hub: Hub) -> None:
    revision = hub.publish()
    content = (hub.store.resolve(MODEL).path / "model.safetensors").read_bytes()
    answer = hub.get(f"/{MODEL}/resolve/{revision}/model.safetensors")
    assert answer.content == content
    assert answer.headers["etag"] == f'"{hashlib.sha256(content).hexdigest()}"' == answer.headers["x-linked-etag"]
    assert answer.headers["x-repo-commit"] == revision
    assert answer.headers["content-length"] == str(len(content)) == answer.headers["x-linked-size"]
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert answer.headers["accept-ranges"] == "bytes" and "content-encoding" not in answer.headers
    assert "filename*=UTF-8''model.safetensors" in answer.headers["content-disposition"]
    head = httpx.head(f"{hub.url}/{MODEL}/resolve/{revision}/model.safetensors")
    assert head.headers["content-length"] == str(len(content)) and head.content == b""


def test_text_has_gits_own_id_and_runs_nowhere(hub: Hub) -> None:
    revision = hub.publish(card="<script>alert(1)</script>")
    answer = hub.get(f"/{MODEL}/resolve/{revision}/README.md")
    blob = b"blob 25\0<script>alert(1)</script>"
    assert answer.headers["etag"] == f'"{hashlib.sha1(blob).hexdigest()}"'
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in answer.headers["content-security-policy"]


def test_other_names_of_a_revision_lead_to_its_whole_hash(hub: Hub) -> None:
    revision = hub.publish()
    for path in (f"/{MODEL}/resolve/main", f"/{MODEL.upper()}/resolve/main", f"/{MODEL}/resolve/{revision[:7]}"):
        answer = hub.get(f"{path}/runs/train.json")
        assert answer.status_code == 307
        assert answer.headers["location"] == f"/{MODEL}/resolve/{revision}/runs/train.json"
        assert answer.headers["x-repo-commit"] == revision and answer.headers["cache-control"] == "no-cache"
    assert hub.get(f"/huggingtweets%2Fada/resolve/{revision}/runs%2Ftrain.json").content == b"{}"


@pytest.mark.parametrize(
    ("asked", "status", "part"),
    [
        ("bytes=0-9", 206, slice(0, 10)),
        ("bytes=10-", 206, slice(10, None)),
        ("bytes=-5", 206, slice(-5, None)),
        ("bytes=-999999999", 206, slice(None)),
        ("bytes=5-99999999999", 206, slice(5, None)),
        ("bytes=0-0,5-6", 200, slice(None)),
        ("bytes=" + "0-1," * 5000 + "0-1", 200, slice(None)),
        ("bytes=9-5", 200, slice(None)),
        ("bytes=-", 200, slice(None)),
        ("lines=1-2", 200, slice(None)),
        ("bytes=99999999-", 416, slice(0, 0)),
        ("bytes=-0", 416, slice(0, 0)),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_single_range_is_answered_and_all_others_are_not_worked_on(
    hub: Hub, asked: str, status: int, part: slice
) -> None:
    revision = hub.publish()
    content = (hub.store.resolve(MODEL).path / "model.safetensors").read_bytes()
    answer = hub.get(f"/{MODEL}/resolve/{revision}/model.safetensors", range=asked)
    assert (answer.status_code, answer.content) == (status, content[part])
    if status == 206:
        start, stop, _ = part.indices(len(content))
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(content)}"
    if status == 416:
        assert answer.headers["content-range"] == f"bytes */{len(content)}"


def test_a_range_of_another_content_gets_the_whole(hub: Hub) -> None:
    path = f"/{MODEL}/resolve/{hub.publish()}/config.json"
    etag = hub.get(path).headers["etag"]
    assert hub.get(path, range="bytes=0-0", if_range=etag).status_code == 206
    assert hub.get(path, range="bytes=0-0", if_range='"another"').status_code == 200


def test_what_a_client_has_is_not_sent_again(hub: Hub) -> None:
    path = f"/{MODEL}/resolve/{hub.publish()}/config.json"
    etag = hub.get(path).headers["etag"]
    for known in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        answer = hub.get(path, if_none_match=known)
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == etag


def test_a_file_that_is_being_read_stays_though_its_model_is_deleted(hub: Hub) -> None:
    revision = hub.publish()
    path = hub.store.resolve(MODEL).path / "model.safetensors"
    content = path.read_bytes()
    with httpx.stream("GET", f"{hub.url}/{MODEL}/resolve/{revision}/model.safetensors") as answer:
        hub.store.delete_model(MODEL)
        assert not path.exists()
        assert answer.read() == content


@pytest.mark.parametrize(
    "name",
    [
        "../config.json",
        "..%2Fconfig.json",
        "runs/../config.json",
        "/etc/passwd",
        ".datasets/x",
        "runs",
        "",
        "config.json/",
    ],
)
def test_only_what_is_listed_is_a_file(hub: Hub, name: str) -> None:
    revision = hub.publish()
    connection = HTTPConnection(hub.url.removeprefix("http://"))  # sends the path as it is
    connection.request("GET", f"/{MODEL}/resolve/{revision}/{name}")
    answer = connection.getresponse()
    connection.close()
    assert (answer.status, answer.getheader("x-error-code")) == (404, "EntryNotFound")


def test_a_revision_may_be_called_as_git_calls_it(hub: Hub) -> None:
    revision = hub.publish()
    hub.store.publish(MODEL, _copy(hub, revision), alias="v1")
    for name in ("refs%2Fheads%2Fmain", "refs%2Ftags%2Fv1", "refs/heads/main"):
        assert hub.get(f"/api/models/{MODEL}/revision/{name}").json()["sha"] == revision
        assert [one["path"] for one in hub.get(f"/api/models/{MODEL}/tree/{name}/runs").json()] == ["runs/train.json"]
        found = hub.get(f"/{MODEL}/resolve/{name}/runs/train.json")
        assert found.headers["location"] == f"/{MODEL}/resolve/{revision}/runs/train.json"
        assert hub.get(f"/{MODEL}/raw/{name}/runs/train.json").content == b"{}"
        assert hub.get(f"/api/models/{MODEL}/commits/{name}").json()[0]["id"] == revision


def _copy(hub: Hub, revision: str) -> Path:
    source, staged = hub.store.resolve(f"{MODEL}@{revision}").path, hub.store.stage()
    return shutil.copytree(source, staged, dirs_exist_ok=True)


def test_paths_may_be_asked_for_with_nothing_expanded(hub: Hub) -> None:
    hub.publish()
    for expand, has_commit in (([], False), (["true"], True), (["false"], False)):
        body = {"paths": ["config.json"], "expand": expand}
        (found,) = httpx.post(f"{hub.url}/api/models/{MODEL}/paths-info/main", json=body).json()
        assert ("lastCommit" in found) is has_commit


def test_a_head_has_no_range(hub: Hub) -> None:
    path = f"/{MODEL}/resolve/{hub.publish()}/config.json"
    whole = hub.get(path).headers["content-length"]
    for asked in ("bytes=0-1", "bytes=99999999-"):
        head = httpx.head(hub.url + path, headers={"range": asked})
        assert (head.status_code, head.headers["content-length"]) == (200, whole)


def test_nothing_is_discussed_here(hub: Hub) -> None:
    hub.publish()
    assert hub.get(f"/api/models/{MODEL}/discussions").json()["count"] == 0
    assert hub.get(f"/api/models/{MODEL}/discussions/1").status_code == 404
    assert hub.get("/api/models/no/model/discussions/1").headers["x-error-code"] == "RepoNotFound"
    hub.publish("huggingtweets/discussions", seed=5)
    for path in ("", "/revision/main", "/auth-check"):
        assert hub.get(f"/api/models/huggingtweets/discussions{path}").status_code == 200


def test_a_large_file_is_a_pointer_in_git(hub: Hub) -> None:
    revision = hub.publish()
    pointer = hub.get(f"/{MODEL}/raw/{revision}/model.safetensors").content
    info = hub.get(f"/api/models/{MODEL}?blobs=true").json()
    (weights,) = [one for one in info["siblings"] if one["rfilename"] == "model.safetensors"]
    assert weights["lfs"]["pointerSize"] == len(pointer) and weights["lfs"]["sha256"].encode() in pointer
    assert weights["blobId"] == hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()


def test_errors_are_the_hubs_own(hub: Hub) -> None:
    revision = hub.publish()
    for path, code, status in [
        ("/api/models/no/model", "RepoNotFound", 401),
        ("/no/model/resolve/main/config.json", "RepoNotFound", 401),
        ("/api/datasets/no/data", "RepoNotFound", 401),
        (f"/api/models/{MODEL}/revision/nothing", "RevisionNotFound", 404),
        (f"/{MODEL}/resolve/nothing/config.json", "RevisionNotFound", 404),
        (f"/api/models/{MODEL}/tree/refs%2Fpr%2F1", "RevisionNotFound", 404),
        (f"/{MODEL}/resolve/main/adapter_config.json", "EntryNotFound", 404),
        (f"/{MODEL}/resolve/{revision}/adapter_config.json", "EntryNotFound", 404),
        (f"/api/models/{MODEL}/tree/main/no-folder", "EntryNotFound", 404),
    ]:
        answer = hub.get(path)
        assert (answer.headers["x-error-code"], answer.status_code) == (code, status), path
        assert answer.json()["error"] == answer.headers["x-error-message"]
    assert hub.get("/api/models/no/model", **STRANGER).status_code == 404
    assert hub.get(f"/{MODEL}/resolve/main/adapter_config.json").headers["x-repo-commit"] == revision


def test_nothing_can_be_written_but_who_sees_a_model(hub: Hub) -> None:
    hub.publish()
    for path in ("/api/repos/create", f"/api/models/{MODEL}/commit/main", f"/{MODEL}.git/info/lfs/objects/batch"):
        answer = httpx.post(hub.url + path, json={}, headers=WITH_KEY)
        assert answer.status_code == 405 and "read-only" in answer.headers["x-error-message"]
    settings = f"{hub.url}/api/models/{MODEL}/settings"
    assert httpx.put(settings, json={"private": True}).status_code == 401
    assert httpx.put(settings, json={"gated": "auto"}, headers=WITH_KEY).status_code == 400
    assert (
        httpx.put(f"{hub.url}/api/models/fledgling/settings", json={"private": True}, headers=WITH_KEY).status_code
        == 409
    )


def test_checkpoints_are_there_by_revision_alone(hub: Hub) -> None:
    main = hub.publish(seed=1)
    staged = hub.store.stage()
    write_tiny_gpt2(staged, seed=5)
    (staged / "rookery.json").write_text(json.dumps({"checkpoint_step": 40, "job_id": "ftjob-1"}))
    checkpoint = hub.store.publish(MODEL, staged, alias=None).revision
    assert hub.get(f"/api/models/{MODEL}").json()["sha"] == main
    assert hub.get(f"/api/models/{MODEL}/revision/{checkpoint}").json()["sha"] == checkpoint
    assert hub.get(f"/{MODEL}/resolve/{checkpoint}/model.safetensors").status_code == 200
    assert [one["id"] for one in hub.get(f"/api/models/{MODEL}/commits/main").json()] == [main]


def test_a_card_that_is_a_bomb_or_nonsense_is_left_out(hub: Hub) -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for card in (f"---\n{bomb}---\n", "---\n: : :\n---\n", "---\n" + "[" * 5000 + "\n---\n", "---\n- a\n---\n", "\xff"):
        hub.publish("huggingtweets/odd", card=card)
        info = hub.get("/api/models/huggingtweets/odd")
        assert info.status_code == 200 and info.json()["cardData"] == {}
    hub.publish("huggingtweets/odd", card="---\ndate: 2021-01-01\n1: .nan\nlicense: [mit, 3]\n---\n")
    info = hub.get("/api/models/huggingtweets/odd").json()
    assert info["cardData"]["date"] == "2021-01-01" and "license:mit" in info["tags"]


HOSTILE = [
    "[" * 20_000,
    "{a: 1}," * 3000,
    "".join(f"k{i}: 1{':59' * 18}\n" for i in range(1000)),
    "a: 1" + ":59" * 5000,
]


def test_a_page_of_hostile_cards_costs_little(hub: Hub) -> None:
    hub.publish()
    source = hub.store.resolve(MODEL).path
    for number in range(100):
        home = hub.folder / "data" / "models" / "many" / f"bot{number:03}"
        home.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (home / name).hardlink_to(source / name)
        (home / "README.md").write_text(f"---\n{HOSTILE[number % 4]}\n---\n")
    hub.get("/api/models?author=many")  # the catalogue has looked at the folders
    start = time.process_time()
    answer = hub.get("/api/models?author=many&cardData=true")
    assert time.process_time() - start < 0.5
    assert [one["cardData"] for one in answer.json()] == [{}] * 100


def test_a_card_is_read_again_when_it_is_another(hub: Hub) -> None:
    home = hub.folder / "data" / "models" / "put" / "bot"
    shutil.copytree(hub.store.resolve("fledgling").path, home)
    for number in (1, 2):
        (home / "README.md").write_text(f"---\nnumber: {number}\n---\n")
        os.utime(home / "README.md", (number, number))
        assert hub.get("/api/models/put/bot").json()["cardData"] == {"number": number}


def test_the_next_page_is_at_the_address_that_the_caller_used(hub: Hub) -> None:
    for name in ("a", "b", "c"):
        hub.publish(f"huggingtweets/{name}")
    answer = hub.get("/api/models?limit=2&filter=huggingtweets&search=hugging", host="hub.example:81")
    assert answer.headers["link"].startswith("<http://hub.example:81/api/models?limit=2&filter=huggingtweets")
    assert [one["id"] for one in answer.json()] == ["huggingtweets/a", "huggingtweets/b"]
    rest = hub.get(answer.headers["link"].partition("81")[2].partition(">")[0])
    assert [one["id"] for one in rest.json()] == ["huggingtweets/c"] and "link" not in rest.headers
    for forwarded, scheme in (("https, http", "https"), ("HTTPS", "https"), ("ftp", "http"), ("evil>;", "http")):
        link = hub.get("/api/models?limit=1", x_forwarded_proto=forwarded).headers["link"]
        assert link.startswith(f"<{scheme}://127.0.0.1:")
    assert hub.get("/api/models?limit=1", host="evil>; x").status_code == 400


def test_the_newest_come_first_on_every_page(hub: Hub) -> None:
    names = ["huggingtweets/b", "huggingtweets/c", "huggingtweets/a", "huggingtweets/d"]
    for number, name in enumerate(names):
        hub.publish(name, seed=number // 2)  # two of each second
    newest, found = ["huggingtweets/d", "huggingtweets/a", "huggingtweets/c", "huggingtweets/b"], list[str]()
    path = "/api/models?sort=createdAt&limit=1&author=huggingtweets"
    while path:
        answer = hub.get(path)
        found += [one["id"] for one in answer.json()]
        if len(found) == 1:
            hub.store.delete_model("huggingtweets/d")  # the next page begins where it was
        path = answer.headers.get("link", "").partition(hub.url)[2].partition(">")[0]
    assert found == newest


@pytest.mark.parametrize(
    "query",
    ["limit=x", "limit=-1", "sort=nonsense", "expand=nonsense", "sort=createdAt&direction=1", "num_parameters=min:1"]
    + [f"filter={','.join(f't{i}' for i in range(17))}", "sort=createdAt&cursor=x", "sort=createdAt&cursor=1.%00"],
)
def test_a_question_that_cannot_be_answered_says_so(hub: Hub, query: str) -> None:
    answer = hub.get(f"/api/models?{query}")
    assert answer.status_code == 400 and answer.json()["error"]


# --- Private models ---------------------------------------------------------------------------------------


def test_without_a_key_a_private_model_is_nowhere(hub: Hub) -> None:
    revision = hub.publish("huggingtweets/secret", seed=3)
    hub.store.set_private("huggingtweets/secret", True)
    for path in (
        "/api/models/{}",
        "/api/models/{}/revision/main",
        "/api/models/{}/tree/main",
        "/api/models/{}/refs",
        "/api/models/{}/commits/main",
        "/api/models/{}/auth-check",
        "/{}/resolve/main/config.json",
        f"/{{}}/resolve/{revision}/config.json",
        f"/{{}}/resolve/{revision[:8]}/config.json",
        "/{}/raw/main/config.json",
        "/v1/models/{}",
        "/v1/models/{}@" + revision,
        "/v1/models/{}/versions",
        "/v1/models/{}/picture",
    ):
        for headers in ({}, STRANGER):
            hidden = hub.get(path.format("huggingtweets/secret"), **headers)
            missing = hub.get(path.format("huggingtweets/nobody"), **headers)
            assert hidden.status_code == missing.status_code in (401, 404), path
            assert hidden.text.replace("secret", "nobody") == missing.text
            assert set(hidden.headers) == set(missing.headers)
        assert hub.get(path.format("huggingtweets/secret"), **WITH_KEY).status_code in (200, 307), path
    for path in ("/api/models", "/v1/models"):
        assert "secret" not in hub.get(path).text and "secret" in hub.get(path, **WITH_KEY).text
    cached = hub.get(f"/huggingtweets/secret/resolve/{revision}/config.json", **WITH_KEY).headers["cache-control"]
    assert cached.startswith("private")


def test_whoever_has_no_key_learns_no_more_than_what_was_asked(hub: Hub) -> None:
    for step in (100, 200):  # two revisions that begin alike
        staged = hub.store.stage()
        write_tiny_gpt2(staged, seed=step)
        hub.store.publish("huggingtweets/Secret", staged, revision=f"job-abc1234-step-{step}", alias=None)
    hub.publish("huggingtweets/Secret", seed=3)
    hub.store.set_private("huggingtweets/Secret", True)
    for path in (
        "/v1/models/{}@job-abc1234",
        "/v1/models/{}@job-abc1234/picture",
        "/v1/models/{}@job-abc1234/versions",
        "/api/models/{}/revision/job-abc1234",
        "/{}/resolve/job-abc1234/config.json",
    ):
        hidden, missing = hub.get(path.format("huggingtweets/secret")), hub.get(path.format("huggingtweets/nobody"))
        assert hidden.status_code == missing.status_code in (401, 404)
        assert hidden.text.replace("secret", "nobody") == missing.text and "Secret" not in hidden.text
    assert "2 revisions" in hub.get("/v1/models/huggingtweets/secret@job-abc1234", **WITH_KEY).text
    for cursor in ("huggingtweets/secret", "huggingtweets/nobody", "1700000003.huggingtweets/secret"):
        listed = hub.get(f"/api/models?sort=createdAt&cursor={cursor}")
        assert listed.status_code == (200 if cursor[0] == "1" else 400) and "ecret" not in listed.text


def test_caches_that_many_share_keep_nothing_private(hub: Hub) -> None:
    revision = hub.publish()
    paths = [f"/v1/models/{MODEL}/picture", f"/v1/models/{MODEL}@{revision}/picture"]
    paths += [f"/{MODEL}/{kind}/{revision}/README.md" for kind in ("resolve", "raw")]
    for is_private in (False, True):
        hub.store.set_private(MODEL, is_private)
        for path in paths:
            said = hub.get(path, **WITH_KEY).headers["cache-control"]
            assert said.startswith("private") is is_private and ("immutable" in said) is (revision in path)


def test_what_an_alias_names_is_asked_for_again(hub: Hub) -> None:
    hub.publish()
    for name in ("README.md", "model.safetensors"):
        assert hub.get(f"/{MODEL}/raw/main/{name}").headers["cache-control"] == "no-cache"


def test_generation_is_told_who_sees_private_models(hub: Hub) -> None:
    for path, body in [
        ("/v1/completions", {"model": MODEL, "prompt": "My"}),
        ("/generate", {"inputs": "My"}),
        (f"/models/{MODEL}", {"inputs": "My"}),
    ]:
        for headers in ({}, STRANGER, WITH_KEY):
            assert httpx.post(hub.url + path, json=body, headers=headers).status_code == 200
    assert [request.sees_private for request in hub.generator.requests] == [False, False, True] * 3


def test_without_keys_everybody_sees_everything(hub: Hub) -> None:
    nobody = Request({"type": "http", "headers": []})
    for keys in ("", " , "):
        assert Access.from_setting(keys).has_key(nobody)
    access = Access.from_setting(" one ,two")
    for key, is_known in (("one", True), ("two", True), ("one ,two", False), ("", False), ("\xff", False)):
        header = (b"authorization", b"bEaReR " + key.encode("latin-1"))
        assert access.has_key(Request({"type": "http", "headers": [header]})) == is_known
