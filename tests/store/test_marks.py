"""What is said of whole models: which are private, which stay, which came from a Hub and may go."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from serve.errors import Conflict, InvalidRequest, ModelNotFound
from serve.store.revisions import Revision, Store
from serve.types import EVERYBODY, Visibility
from tests.fakes.models import write_tiny_gpt2

ADA = "huggingtweets/ada"
SHA = "1234567890" * 4


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data", embedded={"fledgling": write_tiny_gpt2(tmp_path / "fledgling", seed=99)})


def publish(store: Store, model_id: str = ADA, *, seed: int = 0, **facts: object) -> Revision:
    """A finished model, or with `checkpoint_step` a checkpoint, which no alias names."""
    folder = write_tiny_gpt2(store.stage(), seed=seed)
    (folder / "rookery.json").write_text(json.dumps(facts))
    return store.publish(model_id, folder, alias=None if "checkpoint_step" in facts else "main")


def fetch(
    store: Store, model_id: str, *, sha: str = SHA, alias: str = "main", visibility: Visibility = Visibility.PUBLIC
) -> Revision:
    folder = write_tiny_gpt2(store.stage(), seed=int(sha[0]))
    (folder / "rookery.json").write_text(json.dumps({"source": "hub"}))
    return store.publish(model_id, folder, revision=sha, alias=alias, visibility=visibility)


# --- Private --------------------------------------------------------------------------------------------------


def test_private_model_says_so_wherever_it_is_met(store: Store) -> None:
    publish(store)
    assert not store.resolve(ADA).is_private and not store.get_model(ADA).is_private

    store.set_visibility(ADA.upper(), Visibility.PRIVATE)

    assert store.resolve(ADA).is_private and store.resolve("HuggingTweets/ADA").is_private
    assert store.get_model(ADA).is_private and store.list_models(limit=9).items[1].is_private
    assert [info.model_id for info in store.list_models(limit=9, viewer=EVERYBODY).items] == ["fledgling"]
    new = publish(store, seed=2)
    assert new.is_private and store.resolve(f"{ADA}@{new.revision}").is_private

    store.set_visibility(ADA, Visibility.PUBLIC)
    assert not store.resolve(ADA).is_private
    assert len(store.list_models(limit=9, viewer=EVERYBODY).items) == 2


def test_fetched_private_model_is_private_before_anybody_can_see_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked, rename = list[bool](), os.rename

    def looking(source: Path, target: Path) -> None:
        if Path(target).name == SHA:
            marked.append((Path(target).parent / ".private").exists())
        rename(source, target)

    monkeypatch.setattr(os, "rename", looking)
    assert fetch(store, "org/secret", visibility=Visibility.PRIVATE).is_private
    assert marked == [True]
    fetch(store, "org/secret", sha="2" * 40)
    assert store.resolve("org/secret").is_private  # a later fetch makes nothing public


def test_folder_put_there_by_hand_can_be_private(store: Store, tmp_path: Path) -> None:
    write_tiny_gpt2(tmp_path / "data/models/huggingtweets/dropped")
    revision = store.resolve("huggingtweets/dropped").revision
    store.set_visibility("huggingtweets/dropped", Visibility.PRIVATE)
    found = store.resolve("huggingtweets/dropped")
    assert found.is_private and found.revision == revision
    assert [info.model_id for info in store.list_models(limit=9, viewer=EVERYBODY).items] == ["fledgling"]


def test_what_is_not_there_and_what_comes_with_the_program_cannot_be_marked(store: Store, tmp_path: Path) -> None:
    (tmp_path / "data/models/huggingtweets/empty").mkdir(parents=True)
    for model_id in ("huggingtweets/nobody", "huggingtweets/empty"):
        with pytest.raises(ModelNotFound):
            store.set_visibility(model_id, Visibility.PRIVATE)
        with pytest.raises(ModelNotFound):
            store.keep(model_id)
    with pytest.raises(Conflict):
        store.set_visibility("Fledgling", Visibility.PRIVATE)
    with pytest.raises(InvalidRequest):
        store.set_visibility(f"{ADA}@main", Visibility.PRIVATE)


# --- Aliases --------------------------------------------------------------------------------------------------


def test_aliases_are_listed_with_main_among_them(store: Store, tmp_path: Path) -> None:
    old, new = publish(store, seed=1), publish(store, seed=2)
    store.set_alias(old, "v1")
    assert store.list_aliases(ADA.upper()) == {"main": new.revision, "v1": old.revision}
    assert store.list_aliases("fledgling") == {"main": store.resolve("fledgling").revision}
    dropped = write_tiny_gpt2(tmp_path / "data/models/huggingtweets/dropped")
    assert store.list_aliases("huggingtweets/dropped") == {"main": store.resolve("huggingtweets/dropped").revision}
    (dropped.parent / "ada" / "dangling").symlink_to("nowhere")
    assert set(store.list_aliases(ADA)) == {"main", "v1"}
    publish(store, "huggingtweets/halfway", checkpoint_step=3)
    assert store.list_aliases("huggingtweets/halfway") == {}
    with pytest.raises(ModelNotFound):
        store.list_aliases("huggingtweets/nobody")


# --- What may go ----------------------------------------------------------------------------------------------


def test_only_what_was_fetched_and_is_not_kept_may_go(store: Store, tmp_path: Path) -> None:
    one, two = fetch(store, "org/one"), fetch(store, "org/one", sha="2" * 40, alias="v2")
    fetch(store, "org/kept")
    by_commit = fetch(store, "org/by_commit", alias="v1")
    publish(store)
    (write_tiny_gpt2(tmp_path / "data/models/org/dropped") / "rookery.json").write_text('{"source": "hub"}')
    store.keep("org/kept")

    fetched = sorted(store.fetched())

    assert [(found.model_id, found.revision, found.path) for found in fetched] == [
        (found.model_id, found.revision, found.path) for found in (by_commit, one, two)
    ]
    sizes = [sum(path.stat().st_size for path in found.path.iterdir()) for found in fetched]
    assert [found.num_bytes for found in fetched] == sizes
    assert store.get_model("org/one").from_hub and not store.get_model(ADA).from_hub


def test_dropped_revision_takes_its_aliases_and_at_last_the_home_with_it(store: Store, tmp_path: Path) -> None:
    fetch(store, "org/one")
    two = fetch(store, "org/one", sha="2" * 40, alias="v2")
    home = tmp_path / "data/models/org/one"

    assert store.drop_revision("org/one", SHA)
    assert sorted(os.listdir(home)) == sorted(["2" * 40, "v2"])
    assert [found.revision for found in store.fetched()] == [two.revision]
    assert [info.model_id for info in store.list_models(limit=9).items] == ["fledgling"]
    assert not store.drop_revision("org/one", SHA)
    assert store.drop_revision("org/one", two.revision)
    assert not home.exists() and list(store.fetched()) == []
    with pytest.raises(ModelNotFound):
        store.resolve("org/one")
    with pytest.raises(Conflict):
        store.drop_revision("fledgling", store.resolve("fledgling").revision)


def test_model_that_was_private_is_so_again_after_its_last_revision_has_gone(store: Store) -> None:
    fetch(store, "org/one")
    store.set_visibility("org/one", Visibility.PRIVATE)
    store.drop_revision("org/one", SHA)
    with pytest.raises(ModelNotFound):
        store.resolve("org/one")
    assert fetch(store, "org/one").is_private
    store.delete_model("org/one")
    assert not fetch(store, "org/one").is_private
