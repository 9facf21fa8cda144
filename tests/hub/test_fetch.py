"""Fetching over real HTTP from a fake Hub: only what is needed, checked, once, and every fault by its right name."""

from __future__ import annotations

import functools
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session, constants

from serve.errors import (
    DiskFull,
    HubUnreachable,
    ModelGated,
    ModelNotFound,
    ModelUnusable,
    RookeryError,
    StoreUnavailable,
)
from serve.hub import fetch
from serve.hub.breaker import Breakers
from serve.hub.fetch import Hub
from serve.hub.session import Session
from serve.store.revisions import Store
from serve.types import PullProgress
from tests.fakes.hub import FakeHub, Fault
from tests.fakes.models import write_tiny_gpt2
from tests.faults.payloads import Call
from tests.store.test_convert import logits, write_old_checkpoint

ADA = "huggingtweets/ada"


def test_model_is_fetched_under_its_commit_and_then_found_without_the_hub(
    server: FakeHub, hub: Hub, store: Store, tmp_path: Path
) -> None:
    sha = server.add(ADA, write_tiny_gpt2(tmp_path / "repo"))

    fetched = hub.locate(ADA)
    assert (fetched.model_id, fetched.revision) == (ADA, sha)
    num_requests = len(server.requests)

    server.close_door()
    for here in (hub, Hub(Store(tmp_path / "data", embedded={}), endpoint=server.endpoint)):  # and after a restart
        for name in (ADA, "HuggingTweets/Ada", f"{ADA}@main", f"{ADA}@{sha}", f"{ADA}@{sha[:7]}"):
            assert here.locate(name) == fetched
        assert here.fetch(f"{ADA}@{sha}") == fetched
    assert len(server.requests) == num_requests
    assert store.resolve(ADA) == fetched


def test_branches_tags_and_shortened_commits_are_fetched_as_the_commits_they_name(
    server: FakeHub, hub: Hub, store: Store, tmp_path: Path
) -> None:
    old = server.add(ADA, write_tiny_gpt2(tmp_path / "old", seed=1), tag="v1")
    server.repos[ADA].tags[old[:8]] = old  # as the real Hub resolves it
    side = server.add(ADA, write_tiny_gpt2(tmp_path / "side", seed=2), branch="side")
    main = server.add(ADA, write_tiny_gpt2(tmp_path / "new", seed=3))
    assert hub.locate(f"{ADA}@{old[:8]}").revision == old
    num_requests = server.num_requests()
    assert hub.locate(f"{ADA}@v1").revision == old
    assert server.num_requests() == num_requests + 1, "only the Hub knows which commit a tag is, and its files are here"
    assert hub.locate(f"{ADA}@side").revision == side
    assert hub.locate(ADA).revision == main
    assert store.list_aliases(ADA) == {"main": main, "side": side, "v1": old}
    num_requests = server.num_requests()
    for revision in ("v1", "side", "main", old, old[:8]):
        hub.locate(f"{ADA}@{revision}")
    assert server.num_requests() == num_requests


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


@pytest.mark.parametrize("error", [DiskFull("full"), StoreUnavailable("no memory")], ids=str)
def test_conversion_that_may_succeed_later_keeps_the_download(
    server: FakeHub, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RookeryError
) -> None:
    server.add("old", write_old_checkpoint(tmp_path / "old", seed=5))

    def fail(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(fetch, "finish_weights", fail)
        for _ in range(2):
            with pytest.raises(type(error)):
                hub.locate("old")
    fetched = hub.locate("old")
    assert torch.equal(logits(fetched.path), logits(write_tiny_gpt2(tmp_path / "new", seed=5)))
    assert sum(seen.path.startswith("/storage/") for seen in server.requests) == 1, "the weights came more than once"
    assert os.listdir(tmp_path / "data/models/.staging") == []


def test_pickle_that_does_something_is_not_run(
    server: FakeHub, hub: Hub, tmp_path: Path, nothing_left: Callable[[], None]
) -> None:
    repo = write_old_checkpoint(tmp_path / "old")
    torch.save({"x": Call(os.mkdir, str(tmp_path / "harm"))}, repo / "pytorch_model.bin")
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


def test_moved_model_keeps_the_name_by_which_it_is_asked_for(server: FakeHub, hub: Hub, tmp_path: Path) -> None:
    server.add(ADA, write_tiny_gpt2(tmp_path / "repo"))
    server.move(ADA, "lovelace/ada")
    assert hub.locate(ADA).model_id == ADA
    assert json.loads((hub.locate(ADA).path / "rookery.json").read_text())["hub_id"] == "lovelace/ada"


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
        (Fault(500, headers={"Retry-After": "17"}), StoreUnavailable, 17),
        (Fault(418), ModelUnusable, None),
        (Fault(200, path="/main", body=b"<html>log in</html>"), StoreUnavailable, 60),
        (Fault(200, path="/main", body=b"[]"), StoreUnavailable, 60),
        (Fault(200, path="/main", body=b"{}"), StoreUnavailable, 60),
        (Fault(403, path="model.safetensors", headers={"X-Error-Code": "GatedRepo"}), ModelGated, None),
        (Fault(404, path="merges.txt", headers={"X-Error-Code": "EntryNotFound"}), ModelUnusable, None),
        (Fault(200, path="config.json", body=b"{}"), ModelUnusable, None),
    ],
    ids=str,
)
def test_faults_have_their_names_and_leave_nothing(
    server: FakeHub,
    hub: Hub,
    store: Store,
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
    assert type(caught.value) is kind and caught.value.retry_after_s == (
        None if retry_after_s is None else pytest.approx(retry_after_s, abs=1)
    )
    assert time.monotonic() - started < 5
    nothing_left()

    server.recover()  # when the fault is over, the model comes: in another process, for this one leaves the Hub alone
    session = functools.partial(Session, breakers=Breakers())
    hub = Hub(store, endpoint=server.endpoint, token="hf_secret", deadline_s=5, open_session=session)
    hub.forget(ADA)
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


@pytest.mark.slow
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


# --- By hand -------------------------------------------------------------------------------------------------


def test_pull_brings_the_present_commit_tells_how_far_it_is_and_keeps_it(
    server: FakeHub, hub: Hub, store: Store, tmp_path: Path
) -> None:
    server.add(ADA, write_tiny_gpt2(tmp_path / "old", seed=1))
    hub.locate(ADA)
    assert [one.model_id for one in store.fetched()] == [ADA]
    new = server.add(ADA, write_tiny_gpt2(tmp_path / "new", seed=2))
    total = sum(path.stat().st_size for path in (tmp_path / "new").iterdir())
    told: list[PullProgress] = []

    info = hub.pull("HuggingTweets/ada", told.append)

    assert (info.model_id, info.revision, info.from_hub) == (ADA, new, True)
    assert store.resolve(ADA).revision == new and list(store.fetched()) == []
    phases = list(dict.fromkeys(progress.phase for progress in told))
    assert phases == ["resolving", "downloading", "converting", "publishing"]
    brought = [progress for progress in told if progress.phase == "downloading"]
    assert (brought[-1].num_bytes, brought[-1].total_bytes) == (total, total)
    assert [one.num_bytes for one in brought] == sorted(one.num_bytes for one in brought)
    assert {one.file for one in brought} == {path.name for path in (tmp_path / "new").iterdir()}


# --- Room ----------------------------------------------------------------------------------------------------


def test_f12_room_is_made_only_for_a_model_that_is_there_allowed_and_a_gpt2(
    server: FakeHub, store: Store, tmp_path: Path
) -> None:
    def hub(limit_bytes: int) -> Hub:
        return Hub(store, endpoint=server.endpoint, deadline_s=5, limit_bytes=limit_bytes)

    server.add(ADA, write_tiny_gpt2(tmp_path / "ada"))
    weights = hub(0).locate(ADA).path / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns))
    (fetched,) = store.fetched()
    tight = hub(fetched.num_bytes + 100)
    server.add("x/llama", write_tiny_gpt2(tmp_path / "llama"))
    (tmp_path / "llama/config.json").write_text('{"model_type": "llama"}')
    server.add("x/gated", write_tiny_gpt2(tmp_path / "gated"), gated="manual")
    large = write_tiny_gpt2(tmp_path / "large", n_layer=6)
    server.add("x/large", large)
    for name, kind in (
        ("x/nobody", ModelNotFound),
        ("x/gated", ModelGated),
        ("x/llama", ModelUnusable),
        ("x/large", DiskFull),
    ):
        with pytest.raises(kind):
            tight.locate(name)
        assert store.resolve(ADA).path.exists()
    assert not any(seen.path.startswith("/storage/x") for seen in server.requests)

    server.add("x/bob", write_tiny_gpt2(tmp_path / "bob", seed=1))
    assert tight.locate("x/bob").model_id == "x/bob"
    assert [one.model_id for one in store.fetched()] == ["x/bob"]
    with pytest.raises(DiskFull):  # bob is in use
        tight.locate(ADA)


def test_picture_faces_and_card_come_too_and_too_large_ones_are_left(
    server: FakeHub, hub: Hub, store: Store, tmp_path: Path
) -> None:
    repo = write_tiny_gpt2(tmp_path / "repo")
    (repo / "avatars").mkdir()
    for number in range(5):
        (repo / f"avatars/{number}.webp").write_bytes(b"RIFF" + bytes([number]))
    (repo / "thumbnail.png").write_bytes(b"\x89PNG")
    with (repo / "README.md").open("wb") as file:
        file.truncate(6_000_000)
    server.add(ADA, repo)
    names = {path.name for path in hub.locate(ADA).path.iterdir()}
    assert "thumbnail.png" in names and "README.md" not in names
    assert store.get_model(ADA).num_avatars == 3 and store.find_avatar(ADA, 2).read_bytes() == b"RIFF\2"
    assert len(list(store.resolve(ADA).path.glob("avatars/*"))) == 3  # no more are taken from strangers
