"""Fetching over real HTTP from a fake Hub: only what is needed, checked, once, and every fault by its right name."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session, constants

from serve.errors import HubUnreachable, ModelGated, ModelNotFound, ModelUnusable, RookeryError, StoreUnavailable
from serve.store.hub import Hub
from serve.store.revisions import Store
from tests.fakes.hub import FakeHub, Fault, fake_hub
from tests.fakes.models import write_tiny_gpt2
from tests.store.test_convert import Malicious, logits, write_old_checkpoint

ADA = "huggingtweets/ada"


@pytest.fixture
def server() -> Iterator[FakeHub]:
    with fake_hub() as server:
        yield server
    close_session()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data", embedded={})


@pytest.fixture
def hub(server: FakeHub, store: Store) -> Hub:
    return Hub(store, endpoint=server.endpoint, token="hf_secret", deadline_s=20)


@pytest.fixture
def nothing_left(tmp_path: Path) -> Callable[[], None]:
    def check() -> None:
        assert os.listdir(tmp_path / "data/models/.staging") == []
        assert sorted(os.listdir(tmp_path / "data/models")) == [".staging"]

    return check


def test_model_is_fetched_under_its_commit_and_then_found_without_the_hub(
    server: FakeHub, hub: Hub, store: Store, tmp_path: Path
) -> None:
    sha = server.add(ADA, write_tiny_gpt2(tmp_path / "repo"))

    fetched = hub.locate(ADA)
    assert (fetched.model_id, fetched.revision) == (ADA, sha)
    num_requests = len(server.requests)

    assert hub.locate(ADA) == hub.locate("HuggingTweets/Ada") == hub.locate(f"{ADA}@{sha}") == fetched
    assert hub.fetch(f"{ADA}@{sha}") == fetched
    assert len(server.requests) == num_requests
    assert store.resolve(ADA) == fetched


def test_only_needed_files_are_asked_for(server: FakeHub, hub: Hub, tmp_path: Path) -> None:
    repo = write_tiny_gpt2(tmp_path / "repo")
    for extra in ("pytorch_model.bin", "optimizer.pt", "flax_model.msgpack", "code.py", ".gitattributes"):
        (repo / extra).write_bytes(b"x")
    (repo / "README.md").write_text("# Ada")
    server.add(ADA, repo)

    fetched = hub.fetch(ADA)

    asked = {seen.path.rsplit("/", 1)[1] for seen in server.requests if "/resolve/" in seen.path}
    assert asked == {path.name for path in repo.iterdir()} - {
        "pytorch_model.bin",
        "optimizer.pt",
        "flax_model.msgpack",
        "code.py",
        ".gitattributes",
    }
    assert {path.name for path in fetched.path.iterdir()} == asked | {"rookery.json"}
    assert all((fetched.path / name).read_bytes() == (repo / name).read_bytes() for name in asked)


def test_fetched_model_tells_where_it_is_from(server: FakeHub, hub: Hub, store: Store, tmp_path: Path) -> None:
    sha = server.add(ADA, write_tiny_gpt2(tmp_path / "repo"), cardData={"base_model": "gpt2"})
    hub.fetch(ADA)
    info = store.get_model(ADA)
    assert (info.base_model, info.tags, info.created_at) == ("gpt2", ("gpt2",), 1_672_628_645)
    assert json.loads((store.resolve(ADA).path / "rookery.json").read_text())["hub_revision"] == sha


def test_pickled_weights_are_converted_and_compute_the_same(server: FakeHub, hub: Hub, tmp_path: Path) -> None:
    server.add("old", write_old_checkpoint(tmp_path / "old", seed=5))
    fetched = hub.fetch("old")
    assert torch.equal(logits(fetched.path), logits(write_tiny_gpt2(tmp_path / "new", seed=5)))
    assert not list(fetched.path.glob("*.bin"))


def test_pickle_that_does_something_is_not_run(
    server: FakeHub, hub: Hub, tmp_path: Path, nothing_left: Callable[[], None]
) -> None:
    repo = write_old_checkpoint(tmp_path / "old")
    torch.save({"x": Malicious(tmp_path / "harm")}, repo / "pytorch_model.bin")
    server.add(ADA, repo)
    with pytest.raises(ModelUnusable):
        hub.fetch(ADA)
    assert not (tmp_path / "harm").exists()
    nothing_left()


def test_new_commit_moves_main_and_a_named_commit_does_not(
    server: FakeHub, hub: Hub, store: Store, tmp_path: Path
) -> None:
    old = server.add(ADA, write_tiny_gpt2(tmp_path / "old", seed=1))
    by_sha = hub.fetch(f"{ADA}@{old}")
    assert by_sha.revision == old
    with pytest.raises(ModelNotFound):
        store.resolve(ADA)
    num_requests = len(server.requests)
    assert hub.fetch(ADA) == by_sha == store.resolve(ADA)
    assert len(server.requests) == num_requests + 1, "files that are here were fetched again"
    new = server.add(ADA, write_tiny_gpt2(tmp_path / "new", seed=2))
    assert hub.locate(ADA).revision == old
    assert hub.fetch(ADA).revision == new == hub.locate(ADA).revision
    assert hub.locate(f"{ADA}@{old}") == by_sha


def test_token_goes_to_the_endpoint_only(server: FakeHub, hub: Hub, tmp_path: Path) -> None:
    server.add(ADA, write_tiny_gpt2(tmp_path / "repo"))
    hub.fetch(ADA)
    assert {seen.authorization for seen in server.requests} == {"Bearer hf_secret"}


def test_no_token_means_none_at_all(
    server: FakeHub, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    server.add(ADA, write_tiny_gpt2(tmp_path / "repo"))
    Hub(store, endpoint=server.endpoint).fetch(ADA)
    assert {seen.authorization for seen in server.requests} == {None}


def test_weights_at_a_foreign_host_are_not_fetched(
    server: FakeHub, hub: Hub, tmp_path: Path, nothing_left: Callable[[], None]
) -> None:
    server.add(ADA, write_tiny_gpt2(tmp_path / "repo"))
    server.storage = server.endpoint.replace("127.0.0.1", "localhost")
    with pytest.raises(ModelUnusable, match="'localhost'"):
        hub.fetch(ADA)
    assert not any(seen.path.startswith("/storage/") for seen in server.requests)
    nothing_left()


@pytest.mark.parametrize("model_id", ["huggingtweets/nobody", "../x", f"{ADA}@nowhere"])
def test_what_is_not_there_is_not_found(server: FakeHub, hub: Hub, tmp_path: Path, model_id: str) -> None:
    server.add(ADA, write_tiny_gpt2(tmp_path / "repo"))
    with pytest.raises(ModelNotFound):
        hub.locate(model_id)


@pytest.mark.parametrize(
    ("fault", "kind", "retry_after_s"),
    [
        (Fault(404, headers={"X-Error-Code": "RepoNotFound"}), ModelNotFound, None),
        (Fault(401, headers={"X-Error-Code": "GatedRepo"}), ModelGated, None),
        (Fault(403, headers={"X-Error-Code": "GatedRepo"}), ModelGated, None),
        (Fault(403), ModelGated, None),
        (Fault(451), ModelGated, None),
        (Fault(403, headers={"X-Error-Message": "Access to this resource is disabled."}), ModelUnusable, None),
        (Fault(429, headers={"Retry-After": "17"}), StoreUnavailable, 17),
        (Fault(429), StoreUnavailable, 30),
        (Fault(500), StoreUnavailable, 30),
        (Fault(503, headers={"Retry-After": "soon"}), StoreUnavailable, 30),
        (Fault(418), ModelUnusable, None),
        (Fault(200, path="/main", body=b"<html>log in</html>"), StoreUnavailable, 60),
        (Fault(200, path="/main", body=b"[]"), StoreUnavailable, 60),
        (Fault(200, path="/main", body=b"{}"), StoreUnavailable, 60),
        (Fault(403, path="model.safetensors", headers={"X-Error-Code": "GatedRepo"}), ModelGated, None),
        (Fault(503, path="model.safetensors"), StoreUnavailable, 30),
        (Fault(404, path="merges.txt", headers={"X-Error-Code": "EntryNotFound"}), ModelUnusable, None),
        (Fault(200, path="model.safetensors", truncate=True), StoreUnavailable, 30),
        (Fault(200, path="model.safetensors", body=b"<html>"), ModelUnusable, None),
        (Fault(200, path="config.json", body=b"{}"), ModelUnusable, None),
    ],
    ids=str,
)
def test_faults_have_their_names_and_leave_nothing(
    server: FakeHub,
    hub: Hub,
    tmp_path: Path,
    nothing_left: Callable[[], None],
    fault: Fault,
    kind: type[RookeryError],
    retry_after_s: float | None,
) -> None:
    server.add(ADA, write_tiny_gpt2(tmp_path / "repo"))
    server.fail(ADA, fault)
    started = time.monotonic()
    with pytest.raises(RookeryError) as caught:
        hub.locate(ADA)
    assert type(caught.value) is kind and caught.value.retry_after_s == retry_after_s
    assert time.monotonic() - started < 5
    nothing_left()

    server.fail(ADA)  # when the fault is over, the model comes
    assert hub.locate(ADA).model_id == ADA


def test_weights_with_a_wrong_checksum_are_fetched_once_more(server: FakeHub, hub: Hub, tmp_path: Path) -> None:
    repo = write_tiny_gpt2(tmp_path / "repo")
    content = bytearray((repo / "model.safetensors").read_bytes())
    content[-1] ^= 1
    server.add(ADA, repo)
    server.fail(ADA, Fault(200, path="model.safetensors", body=bytes(content), times=1))
    fetched = hub.fetch(ADA)
    assert (fetched.path / "model.safetensors").read_bytes() == (repo / "model.safetensors").read_bytes()


def test_what_is_not_a_gpt2_is_refused_before_its_weights(server: FakeHub, hub: Hub, tmp_path: Path) -> None:
    repo = write_tiny_gpt2(tmp_path / "repo")
    (repo / "config.json").write_text('{"model_type": "llama"}')
    server.add(ADA, repo)
    with pytest.raises(ModelUnusable, match="llama"):
        hub.fetch(ADA)
    assert not any(seen.path.endswith(".safetensors") for seen in server.requests)


def test_weights_larger_than_the_config_allows_are_refused_unread(server: FakeHub, hub: Hub, tmp_path: Path) -> None:
    repo = write_tiny_gpt2(tmp_path / "repo")
    with (repo / "model.safetensors").open("ab") as file:
        file.truncate(50_000_000)
    server.add(ADA, repo)
    with pytest.raises(ModelUnusable, match="50,000,000 bytes"):
        hub.fetch(ADA)
    assert not any(seen.path.endswith(".safetensors") for seen in server.requests)


def test_unreachable_hub_is_told_from_one_in_trouble_and_local_models_stay(store: Store) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        hub = Hub(store, endpoint=f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(HubUnreachable) as unreachable:
            hub.locate("huggingtweets/bob")
        assert (unreachable.value.code, unreachable.value.retry_after_s) == ("hub_unreachable", 30)
        published = store.publish(ADA, write_tiny_gpt2(store.stage()))
        assert hub.locate(ADA) == published


def test_hub_behind_a_proxy_that_refuses_or_switched_to_offline_is_unreachable(
    server: FakeHub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    close_session()  # the proxy is read once
    with monkeypatch.context() as environment:
        environment.setenv("https_proxy", server.endpoint)  # which knows no CONNECT
        with pytest.raises(HubUnreachable):
            Hub(store, endpoint="https://hub.invalid").fetch(ADA)
    close_session()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachable):
        Hub(store, endpoint=server.endpoint).fetch(ADA)
    assert server.requests == []


def test_hub_that_does_not_open_its_door_is_unreachable_soon(store: Store) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.create_connection(full.getsockname()):
        hub = Hub(store, endpoint=f"http://127.0.0.1:{full.getsockname()[1]}", deadline_s=60)
        started = time.monotonic()
        with pytest.raises(HubUnreachable):
            hub.fetch(ADA)
        assert time.monotonic() - started < 7
    close_session()


def test_slow_hub_is_given_up_at_the_deadline(store: Store) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub = Hub(store, endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}", deadline_s=0.5)
        started = time.monotonic()
        with pytest.raises(StoreUnavailable) as slow:
            hub.fetch(ADA)
        assert slow.type is StoreUnavailable
        assert 0.4 < time.monotonic() - started < 1.5
    close_session()


def test_hub_that_is_switched_off_is_not_asked(server: FakeHub, store: Store, tmp_path: Path) -> None:
    server.add(ADA, write_tiny_gpt2(tmp_path / "repo"))
    hub = Hub(store, endpoint=server.endpoint, enabled=False)
    for ask in (hub.locate, hub.fetch):
        with pytest.raises(ModelNotFound):
            ask(ADA)
    assert server.requests == []
