"""The Hub's files, over a real store behind a real server: their bytes and headers."""

from __future__ import annotations

import hashlib
from http.client import HTTPConnection

import httpx
import pytest

from tests.api.hub_world import MODEL, Hub


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


def test_a_head_has_no_range(hub: Hub) -> None:
    path = f"/{MODEL}/resolve/{hub.publish()}/config.json"
    whole = hub.get(path).headers["content-length"]
    for asked in ("bytes=0-1", "bytes=99999999-"):
        head = httpx.head(hub.url + path, headers={"range": asked})
        assert (head.status_code, head.headers["content-length"]) == (200, whole)


def test_a_large_file_is_a_pointer_in_git(hub: Hub) -> None:
    revision = hub.publish()
    pointer = hub.get(f"/{MODEL}/raw/{revision}/model.safetensors").content
    info = hub.get(f"/api/models/{MODEL}?blobs=true").json()
    (weights,) = [one for one in info["siblings"] if one["rfilename"] == "model.safetensors"]
    assert weights["lfs"]["pointerSize"] == len(pointer) and weights["lfs"]["sha256"].encode() in pointer
    assert weights["blobId"] == hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()


def test_what_an_alias_names_is_asked_for_again(hub: Hub) -> None:
    hub.publish()
    for name in ("README.md", "model.safetensors"):
        assert hub.get(f"/{MODEL}/raw/main/{name}").headers["cache-control"] == "no-cache"
