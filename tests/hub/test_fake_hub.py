"""The fake Hub is one that huggingface_hub itself takes for real, and its faults are what they are called."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.fakes.hub import FakeHub, Fault
from tests.fakes.models import write_tiny_gpt2

ADA = "huggingtweets/ada"
WEIGHTS = f"/{ADA}/resolve/main/model.safetensors"


@pytest.fixture
def api(server: FakeHub) -> HfApi:
    return HfApi(endpoint=server.endpoint, token=False)


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return write_tiny_gpt2(tmp_path / "repo")


def test_client_reads_what_is_there_and_its_history(server: FakeHub, api: HfApi, repo: Path, tmp_path: Path) -> None:
    (repo / "1_Pooling").mkdir()
    (repo / "1_Pooling/config.json").write_text("{}")
    first = server.add(ADA, repo, tag="v1")
    second = server.add(ADA, write_tiny_gpt2(tmp_path / "new", seed=2))
    assert server.add(ADA, write_tiny_gpt2(tmp_path / "side", seed=3), branch="side") != second

    assert api.model_info(ADA).sha == second and api.model_info(ADA, revision="v1").sha == first
    assert [model.id for model in api.list_models(search="ADA")] == [ADA]
    refs = api.list_repo_refs(ADA)
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first}
    assert {ref.name for ref in refs.branches} == {"main", "side"}
    assert [commit.commit_id for commit in api.list_repo_commits(ADA)] == [second, first]
    names = {path.relative_to(repo).as_posix() for path in repo.rglob("*") if path.is_file()}
    assert {entry.path for entry in api.list_repo_tree(ADA, revision=first, recursive=True)} == names
    (weights,) = api.get_paths_info(ADA, ["model.safetensors"])
    assert getattr(weights, "size", None) == (repo / "model.safetensors").stat().st_size
    with pytest.raises(RevisionNotFoundError):
        api.model_info(ADA, revision="v2")


@pytest.mark.parametrize("has_resolve_cache", [False, True])
def test_snapshot_is_the_folder(server: FakeHub, repo: Path, tmp_path: Path, has_resolve_cache: bool) -> None:
    server.has_resolve_cache = has_resolve_cache
    server.storage = server.endpoint.replace("127.0.0.1", "localhost")  # another host, as the client expects it
    server.add(ADA, repo)
    folder = Path(
        snapshot_download(ADA, endpoint=server.endpoint, cache_dir=tmp_path / "cache", token=False, max_workers=1)
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in repo.iterdir()
    }
    assert server.bytes_sent[f"/storage/{ADA}/resolve/{folder.name}/model.safetensors"] > 0


def test_private_and_gated_models_need_a_token_that_may(server: FakeHub, repo: Path, tmp_path: Path) -> None:
    server.add(ADA, repo, private=True)
    server.add("huggingtweets/gated", repo, gated="manual")
    server.tokens["hf_other"] = False
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=server.endpoint, token=False).model_info(ADA)
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=server.endpoint, token="hf_other").model_info(ADA)
    assert HfApi(endpoint=server.endpoint, token="hf_secret").model_info(ADA).private
    for token in (False, "hf_other"):
        assert HfApi(endpoint=server.endpoint, token=token).model_info("huggingtweets/gated").gated == "manual"
        with pytest.raises((GatedRepoError, LocalEntryNotFoundError)):
            hf_hub_download(
                "huggingtweets/gated", "config.json", endpoint=server.endpoint, cache_dir=tmp_path, token=token
            )


def test_moved_and_otherwise_spelled_names_lead_to_the_new_one(server: FakeHub, api: HfApi, repo: Path) -> None:
    server.add(ADA, repo)
    server.move(ADA, "lovelace/ada")
    assert api.model_info(ADA).id == api.model_info("Lovelace/ADA").id == "lovelace/ada"
    answer = httpx2.get(f"{server.endpoint}/{ADA}/resolve/main/config.json")
    assert (answer.status_code, answer.headers["Location"]) == (307, "/lovelace/ada/resolve/main/config.json")


def test_parts_of_a_file_are_had_while_it_is_the_same(server: FakeHub, repo: Path) -> None:
    sha = server.add(ADA, repo)
    content = (repo / "model.safetensors").read_bytes()
    head = httpx2.head(server.endpoint + WEIGHTS)
    assert (head.status_code, head.headers["X-Repo-Commit"]) == (302, sha)
    assert int(head.headers["X-Linked-Size"]) == len(content)
    url, tag = head.headers["Location"], head.headers["X-Linked-ETag"]

    def get(**headers: str) -> httpx2.Response:
        return httpx2.get(url, headers={name.replace("_", "-"): value for name, value in headers.items()})

    part = get(Range="bytes=100-", If_Range=tag)
    assert (part.status_code, part.content) == (206, content[100:])
    assert part.headers["Content-Range"] == f"bytes 100-{len(content) - 1}/{len(content)}"
    assert get(Range="bytes=5-9").content == content[5:10] and get(Range="bytes=-7").content == content[-7:]
    assert get(Range="bytes=100-", If_Range='"other"').content == content
    beyond = get(Range=f"bytes={len(content)}-")
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{len(content)}")


def test_faults_of_the_answer_are_what_they_are_called(server: FakeHub, repo: Path) -> None:
    server.add(ADA, repo)
    url, content = f"{server.endpoint}/{ADA}/resolve/main/config.json", (repo / "config.json").read_bytes()

    def get(fault: Fault) -> httpx2.Response:
        server.fail(ADA, fault)
        return httpx2.get(url)

    assert get(Fault(429, headers={"Retry-After": "7"}, times=1)).headers["Retry-After"] == "7"
    assert httpx2.get(url).content == content, "a fault that happens once happened twice"
    assert get(Fault(503, path="merges.txt")).status_code == get(Fault(503, method="HEAD")).status_code == 200
    page = get(Fault(body=b"<html>"))
    assert (page.status_code, page.headers["Content-Type"], page.content) == (200, "text/html", b"<html>")
    assert get(Fault(headers={"ETag": '"0"'})).headers["ETag"] == '"0"'
    assert get(Fault(extra=b"more", is_unsized=True)).content == content + b"more"
    zipped = get(Fault(is_gzipped=True))
    assert zipped.content == content and zipped.headers["Content-Encoding"] == "gzip"
    assert json.loads(get(Fault(pace=(50, 0.01))).content)["model_type"] == "gpt2"
    for fault in (Fault(truncate=True), Fault(silent_s=0.1)):
        with pytest.raises(httpx2.RemoteProtocolError):
            get(fault)
    for fault in (Fault(reset="before"), Fault(reset="middle")):
        with pytest.raises(httpx2.ReadError):
            get(fault)
    server.fail(ADA, Fault(head_pace=(1, 0.05)))
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.get(url, timeout=0.02)
    server.fail_everywhere(Fault(503))
    server.recover()
    assert httpx2.get(url).status_code == 200


def test_closed_door_refuses_and_opens_at_the_same_address(server: FakeHub, api: HfApi, repo: Path) -> None:
    sha = server.add(ADA, repo)
    server.fail(ADA, Fault(silent_s=60, times=1))
    with httpx2.stream("GET", f"{server.endpoint}/{ADA}/resolve/main/config.json"):
        started = time.monotonic()
        server.close_door()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(server.endpoint)
    server.open_door()
    assert api.model_info(ADA).sha == sha
    assert time.monotonic() - started < 5


def test_client_is_told_of_trouble(server: FakeHub, api: HfApi, repo: Path) -> None:
    server.add(ADA, repo)
    server.fail(ADA, Fault(500))
    with pytest.raises(HfHubHTTPError):
        api.model_info(ADA)
