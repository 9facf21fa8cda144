"""The Hub's JSON, over a real store behind a real server: revisions, errors, cards and lists."""

from __future__ import annotations

import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import httpx
import yaml  # type: ignore[import-untyped]

from tests.api.hub_world import MODEL, STRANGER, WITH_KEY, Hub
from tests.fakes.models import write_tiny_gpt2


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


def test_nothing_is_discussed_here(hub: Hub) -> None:
    hub.publish()
    assert hub.get(f"/api/models/{MODEL}/discussions").json()["count"] == 0
    assert hub.get(f"/api/models/{MODEL}/discussions/1").status_code == 404
    assert hub.get("/api/models/no/model/discussions/1").headers["x-error-code"] == "RepoNotFound"
    hub.publish("huggingtweets/discussions", seed=5)
    for path in ("", "/revision/main", "/auth-check"):
        assert hub.get(f"/api/models/huggingtweets/discussions{path}").status_code == 200


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
    ours = time.process_time() - start
    start = time.process_time()
    for card in HOSTILE:
        with suppress(yaml.YAMLError, RecursionError):
            yaml.safe_load(card)
    assert ours < 25 * (time.process_time() - start) / 2  # of what it would take to parse them all
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


def test_a_question_that_cannot_be_answered_says_so(hub: Hub) -> None:
    for query in (
        *("limit=x", "limit=-1", "sort=nonsense", "expand=nonsense", "sort=createdAt&direction=1"),
        *("num_parameters=min:1", f"filter={','.join(f't{i}' for i in range(17))}"),
        *("sort=createdAt&cursor=x", "sort=createdAt&cursor=1.%00"),
    ):
        answer = hub.get(f"/api/models?{query}")
        assert answer.status_code == 400 and answer.json()["error"], query
