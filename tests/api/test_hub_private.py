"""Private models, over a real store behind a real server: who sees them, and who learns nothing."""

from __future__ import annotations

import httpx
from fastapi import Request

from serve.api.access import Access
from serve.types import ALL_SEEING, EVERYBODY, Viewer, Visibility
from tests.api.hub_world import MODEL, STRANGER, WITH_KEY, Hub
from tests.fakes.keys import OPERATOR, MemoryKeys
from tests.fakes.models import write_tiny_gpt2


def test_without_a_key_a_private_model_is_nowhere(hub: Hub) -> None:
    revision = hub.publish("huggingtweets/secret", seed=3)
    hub.store.set_visibility("huggingtweets/secret", Visibility.PRIVATE)
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
    hub.store.set_visibility("huggingtweets/Secret", Visibility.PRIVATE)
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
    picture = f"/v1/models/{MODEL}@{revision}/picture"  # of any revision another may be chosen
    paths = [f"/v1/models/{MODEL}/avatar", f"/v1/models/{MODEL}@{revision}/avatar", picture]
    paths += [f"/{MODEL}/{kind}/{revision}/README.md" for kind in ("resolve", "raw")]
    for visibility in Visibility:
        hub.store.set_visibility(MODEL, visibility)
        for path in paths:
            said = hub.get(path, **WITH_KEY).headers["cache-control"]
            assert said.startswith("private") is (visibility is Visibility.PRIVATE)
            assert ("immutable" in said) is (revision in path and path != picture)


def test_generation_is_told_who_asks(hub: Hub) -> None:
    for path, body in [
        ("/v1/completions", {"model": MODEL, "prompt": "My"}),
        ("/generate", {"inputs": "My"}),
        (f"/models/{MODEL}", {"inputs": "My"}),
    ]:
        for headers in ({}, STRANGER, WITH_KEY):
            assert httpx.post(hub.url + path, json=body, headers=headers).status_code == 200
    operator = Viewer(OPERATOR, sees_all=True)
    assert [request.viewer for request in hub.generator.requests] == [EVERYBODY, EVERYBODY, operator] * 3


def test_without_keys_everybody_sees_everything() -> None:
    def viewer(keys: MemoryKeys | None, *headers: tuple[bytes, bytes]) -> Viewer:
        scope = {"type": "http", "headers": headers, "server": ("rookery", 80), "path": "/", "scheme": "http"}
        return Access(keys).caller(Request(scope)).viewer

    assert viewer(None) == viewer(MemoryKeys()) == ALL_SEEING
    for key, is_known in (("one", True), ("two", True), ("one ,two", False), ("", False), ("\xff", False)):
        header = (b"authorization", b"bEaReR " + key.encode("latin-1"))
        assert viewer(MemoryKeys("one", "two"), header) == (Viewer(OPERATOR, True) if is_known else EVERYBODY)
