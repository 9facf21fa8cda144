"""What is here by another way, or becomes so while it is fetched: trained, deleted, erased, published."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.errors import (
    Erased,
    ModelNotFound,
    StoreUnavailable,
)
from serve.hub.fetch import Hub
from serve.store.revisions import Revision, Store
from serve.types import ALL_SEEING, EVERYBODY, PullProgress, Visibility
from tests.fakes.hub import FakeHub
from tests.fakes.models import write_tiny_gpt2

ADA = "huggingtweets/ada"


@pytest.mark.parametrize("visibility", [Visibility.PUBLIC, Visibility.PRIVATE])
def test_model_that_was_trained_here_gets_nothing_from_the_hub_unasked(
    server: FakeHub, hub: Hub, store: Store, tmp_path: Path, visibility: Visibility
) -> None:
    mine = store.publish("huggingtweets/Ada", write_tiny_gpt2(store.stage(), seed=1), visibility=visibility)
    sha = server.add(ADA, write_tiny_gpt2(tmp_path / "repo", seed=2), tag="v1")
    for name in (f"{ADA}@{sha}", f"{ADA}@v1", f"huggingtweets/Ada@{sha}"):
        for viewer in (ALL_SEEING, EVERYBODY):
            with pytest.raises(ModelNotFound):
                hub.locate(name, viewer=viewer)
    assert not any("/resolve/" in seen.path for seen in server.requests)
    assert hub.locate(ADA) == mine

    hub.pull(ADA)  # by hand it may be
    assert os.listdir(tmp_path / "data/models/huggingtweets") == ["Ada"]
    assert hub.locate(f"{ADA}@{sha}").model_id == "huggingtweets/Ada"
    assert hub.locate(ADA).visibility is visibility
    assert hub.locate(f"{ADA}@{mine.revision}").path == mine.path


def test_new_revision_goes_where_the_model_is_in_whatever_spelling(
    server: FakeHub, hub: Hub, store: Store, tmp_path: Path
) -> None:
    old = server.add("huggingtweets/Ada", write_tiny_gpt2(tmp_path / "old", seed=1))
    assert hub.locate(ADA).model_id == "huggingtweets/Ada"
    del server.repos["huggingtweets/Ada"]
    new = server.add(ADA, write_tiny_gpt2(tmp_path / "new", seed=2))
    assert hub.locate(f"{ADA}@{new}").model_id == "huggingtweets/Ada"
    assert {one.revision for one in store.list_revisions(ADA)} == {old, new}


@pytest.mark.parametrize("begins", ["with the model", "without the model"])
def test_model_that_is_deleted_while_it_is_fetched_stays_so(
    server: FakeHub, hub: Hub, store: Store, tmp_path: Path, begins: str
) -> None:
    server.add(ADA, write_tiny_gpt2(tmp_path / "old", seed=1))
    if begins == "with the model":
        hub.locate(ADA)
        store.set_visibility(ADA, Visibility.PRIVATE)
    server.add(ADA, write_tiny_gpt2(tmp_path / "new", seed=2))

    def delete(progress: PullProgress) -> None:
        if progress.phase == "downloading" and progress.file == "model.safetensors" and not deleted:
            if begins == "without the model":  # it came by another way
                store.publish(ADA, write_tiny_gpt2(store.stage(), seed=3))
            deleted.append(store.delete_model("HuggingTweets/ada"))

    deleted: list[str] = []
    with pytest.raises(ModelNotFound, match="deleted meanwhile"):
        hub.pull(ADA, delete)
    with pytest.raises(ModelNotFound):
        store.resolve(ADA)
    assert store.list_models(limit=9).items == () and os.listdir(tmp_path / "data/models/.staging") == []
    assert hub.pull(ADA).model_id == ADA, "the next one is another wish"


@pytest.mark.parametrize("wanted", [ADA, "me/x"])
@pytest.mark.parametrize("ends", ["whole", "broken off"])
def test_who_is_erased_while_a_model_of_theirs_is_fetched_does_not_come_back(
    server: FakeHub, store: Store, tmp_path: Path, wanted: str, ends: str, nothing_left: Callable[[], None]
) -> None:
    hub = Hub(store, endpoint=server.endpoint, deadline_s=5)
    server.add("me/x", write_tiny_gpt2(tmp_path / "repo"))
    server.move("me/x", ADA)

    def erase(progress: PullProgress) -> None:
        if progress.phase == "downloading" and progress.file == "model.safetensors":
            store.burials.bury("@ada", "erased")
            if ends == "broken off":
                hub.close()

    with pytest.raises(Erased):
        hub.fetch(wanted, on_progress=erase)
    nothing_left()
    assert store.list_models(limit=9).items == ()
    num_files = sum("/resolve/" in seen.path for seen in server.requests)
    again = Hub(store, endpoint=server.endpoint)
    with pytest.raises(Erased):
        again.pull(wanted)
    for viewer in (ALL_SEEING, EVERYBODY):
        with pytest.raises(ModelNotFound):
            again.locate(wanted, viewer=viewer)
    assert sum("/resolve/" in seen.path for seen in server.requests) == num_files


def test_what_a_fetch_left_of_a_model_that_never_came_is_forgotten(
    server: FakeHub, hub: Hub, tmp_path: Path, nothing_left: Callable[[], None]
) -> None:
    server.add(ADA, write_tiny_gpt2(tmp_path / "repo"))

    def close(progress: PullProgress) -> None:
        if progress.file == "model.safetensors":
            hub.close()

    with pytest.raises(StoreUnavailable):
        hub.fetch(ADA, on_progress=close)
    with pytest.raises(AssertionError):
        nothing_left()
    hub.forget(ADA.upper())
    nothing_left()


def test_model_that_is_published_here_while_it_is_fetched_is_the_one_that_stays(
    server: FakeHub, hub: Hub, store: Store, tmp_path: Path
) -> None:
    server.add(ADA, write_tiny_gpt2(tmp_path / "repo", seed=1))
    mine: list[str] = []

    def publish(progress: PullProgress) -> None:
        if progress.phase == "converting":
            mine.append(store.publish("huggingtweets/Ada", write_tiny_gpt2(store.stage(), seed=2)).revision)

    with pytest.raises(StoreUnavailable, match="just been published"):
        hub.fetch(ADA, on_progress=publish)
    assert [hub.locate(ADA).revision] == mine


def test_model_that_makes_room_while_its_alias_is_moved_is_fetched_again(
    server: FakeHub, hub: Hub, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha = server.add(ADA, write_tiny_gpt2(tmp_path / "repo"))
    hub.locate(f"{ADA}@{sha}")
    set_alias = store.set_alias

    def too_late(found: Revision, alias: str) -> None:
        store.drop_revision(found.model_id, found.revision)
        set_alias(found, alias)

    monkeypatch.setattr(store, "set_alias", too_late)
    assert hub.locate(ADA).revision == sha
    assert store.resolve(ADA).path.is_dir()
