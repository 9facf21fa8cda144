"""What was deleted, disabled or erased, and what that means to who uses, fetches or makes the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve.errors import Erased, ModelDisabled, ModelNotFound
from serve.store.burials import Burials
from serve.store.model_files import PROVENANCE
from serve.store.revisions import Store
from serve.store.tombstones import Tombstones
from tests.fakes.models import write_tiny_gpt2

ADA = "x/Ada"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path, embedded={})
    store.publish(ADA, write_tiny_gpt2(store.stage()))
    return store


def test_a_tombstone_is_of_a_name_in_any_case_and_does_not_say_it(tmp_path: Path) -> None:
    tombstones = Tombstones(tmp_path / "tombstones")
    assert tombstones.find(ADA) is None and not tombstones.lift(ADA)
    words = {tombstones.bury(name, "deleted", by="key-1", reason="it was asked").word for name in (ADA, "X/ada")}
    found = tombstones.find("x/ADA")
    assert found is not None and (found.why, found.by, found.reason) == ("deleted", "key-1", "it was asked")
    assert len(words) == 2 and found.word in words
    [path] = (tmp_path / "tombstones").iterdir()
    assert "ada" not in (path.name + path.read_text().replace(found.word, "")).lower()
    assert tombstones.find("x/bob") is None
    assert tombstones.lift("x/ada") and tombstones.find(ADA) is None


def test_what_weighs_more_stays_with_a_new_word(tmp_path: Path) -> None:
    tombstones = Tombstones(tmp_path / "tombstones")
    first = tombstones.bury(ADA, "disabled", reason="a complaint")
    second = tombstones.bury(ADA, "deleted")
    assert (second.why, second.reason) == ("disabled", "a complaint") and second.word != first.word
    assert tombstones.bury(ADA, "erased").why == "erased"


@pytest.mark.parametrize("content", ["", "[1]", json.dumps({"why": "?", "word": "a", "at": 1}), '{"why": "erased"}'])
def test_a_damaged_tombstone_counts_as_that_of_a_deletion(tmp_path: Path, content: str) -> None:
    tombstones = Tombstones(tmp_path)
    tombstones.bury(ADA, "erased")
    [path] = tmp_path.iterdir()
    path.write_text(content)
    found = tombstones.find(ADA)
    assert found is not None and found.why == "deleted"


def test_what_was_deleted_comes_back_by_an_explicit_wish_alone(store: Store) -> None:
    store.delete_model("X/ADA", by="key-1")
    burials = store.burials
    with pytest.raises(ModelNotFound, match="deleted here"):
        burials.check_fetch(ADA, is_asked_for=False)
    burials.check_fetch(ADA, is_asked_for=True)
    store.publish(ADA, write_tiny_gpt2(store.stage()), fence=burials.fence(ADA))
    assert burials.of(ADA) is None and store.main_of(ADA)


def test_who_began_before_a_deletion_does_not_publish(store: Store) -> None:
    fence = store.burials.fence(ADA)
    store.delete_model(ADA)
    with pytest.raises(ModelNotFound, match="deleted meanwhile"):
        store.publish(ADA, write_tiny_gpt2(store.stage()), fence=fence)
    assert store.main_of(ADA) is None and store.burials.of(ADA) is not None


def test_a_disabled_model_is_here_and_cannot_be_used_replaced_or_seen_through_a_deletion(store: Store) -> None:
    assert store.disable("X/ada", reason="a complaint") == ADA
    assert store.get_model(ADA).is_disabled and [one.is_disabled for one in store.list_models(limit=9).items] == [True]
    for refused in (
        lambda: store.resolve(ADA),
        lambda: store.publish(ADA, write_tiny_gpt2(store.stage())),
        lambda: store.burials.fence(ADA),
        lambda: store.burials.check_fetch(ADA, is_asked_for=True),
    ):
        with pytest.raises(ModelDisabled):
            refused()
    store.delete_model(ADA)
    with pytest.raises(ModelDisabled):
        store.burials.check_fetch(ADA, is_asked_for=False)
    assert store.enable(ADA) and store.burials.of(ADA) is None


def test_a_model_of_an_erased_person_cannot_be_made_or_fetched(tmp_path: Path) -> None:
    burials = Burials(tmp_path)
    burials.bury("@ada", "erased")
    with pytest.raises(Erased):
        burials.fence("x/anything", ["Ada"])
    burials.fence("x/ada", ["bob"])
    burials.bury("huggingtweets/ada", "deleted")  # which alone could be pulled again
    for model_id in ("huggingtweets/ada", "HuggingTweets/bob-Ada"):
        with pytest.raises(ModelNotFound):
            burials.check_fetch(model_id, is_asked_for=False)
        with pytest.raises(Erased):
            burials.check_fetch(model_id, is_asked_for=True)
    burials.check_fetch("huggingtweets/adage", is_asked_for=False)


def test_what_is_put_here_of_an_erased_person_is_neither_published_nor_used(store: Store) -> None:
    theirs, bobs, new = "huggingtweets/zoe-ada", "huggingtweets/for-ada", "huggingtweets/new-ada"
    for name in (theirs, bobs):
        write_tiny_gpt2(store.models / name)
    (store.models / bobs / PROVENANCE).write_text(json.dumps({"handles": ["bob"]}))
    assert store.resolve(theirs) and store.resolve(bobs)
    store.burials.bury("@ada", "erased")
    with pytest.raises(ModelNotFound):
        store.resolve(theirs)
    for fence in (None, store.burials.fence(ADA)):
        with pytest.raises(Erased):
            store.publish(new, write_tiny_gpt2(store.stage()), fence=fence)
    assert store.resolve(bobs), "of whom a model has learnt, it says better than its name"
    assert store.publish(new, write_tiny_gpt2(store.stage()), fence=store.burials.fence(new, ["bob"]))
    store.burials.lift("@ada")
    assert store.resolve(theirs)
