"""Data sets are kept beside the revisions that learnt them, for nobody but us, and go with the model."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from serve.errors import ModelNotFound, NotFound
from serve.store.datasets import read_dataset
from serve.store.index import INDEX
from serve.store.model_files import content_hash
from serve.store.revisions import Revision, Store
from tests.fakes.models import write_tiny_gpt2

ADA = "huggingtweets/ada"
LINES = [
    '{"text": "na\\u00efve \\ud83e\\udd16"}',
    '{"text": "line\\u2028separator"}',
    "raw \u2028 and \x0c stay inside",
]
SHA256 = hashlib.sha256("\n".join(LINES).encode()).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, embedded={})


def publish(store: Store, *, seed: int = 0, sha256: str = SHA256) -> Revision:
    folder = write_tiny_gpt2(store.stage(), seed=seed)
    store.keep_dataset(folder, sha256, LINES)
    return store.publish(ADA, folder, revision=content_hash(folder))


def test_a_kept_data_set_is_read_as_it_was_written(store: Store) -> None:
    publish(store)
    path = store.find_dataset("HuggingTweets/Ada", SHA256)
    assert path is not None and read_dataset(path) == LINES


def test_it_is_private_and_no_part_of_the_revision(store: Store, tmp_path: Path) -> None:
    published = publish(store)
    path = store.find_dataset(ADA, SHA256)
    assert path is not None
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    plain = Store(tmp_path / "other", embedded={}).publish(ADA, write_tiny_gpt2(_stage_of(tmp_path / "other")))
    assert published.revision == content_hash(published.path) == plain.revision
    assert not (published.path / ".datasets").exists()

    assert [info.model_id for info in store.list_models(limit=9).items] == [ADA]
    assert [info.revision for info in store.list_revisions(ADA)] == [published.revision]
    for name in (f"{ADA}@.datasets", f"{ADA}/.datasets", f"{ADA}@{SHA256}", ".datasets", f"{ADA}@{SHA256}.jsonl.gz"):
        with pytest.raises(ModelNotFound):
            store.resolve(name)
    for digest in ("", "../../" + "a" * 58, SHA256.upper(), SHA256 + "\n", "x" * 64):
        with pytest.raises(NotFound):
            store.find_dataset(ADA, digest)
    assert store.find_dataset(ADA, "0" * 64) is None and store.find_dataset("huggingtweets/bob", SHA256) is None


def _stage_of(root: Path) -> Path:
    return Store(root, embedded={}).stage()


def test_a_data_set_is_not_counted_where_a_folder_was_put_by_hand(store: Store, tmp_path: Path) -> None:
    by_hand = write_tiny_gpt2(tmp_path / "models" / ADA, seed=1)
    num_bytes, revision = store.get_model(ADA).num_bytes, store.resolve(ADA).revision
    (by_hand / ".datasets").mkdir()
    (by_hand / ".datasets" / f"{SHA256}.jsonl.gz").write_bytes(b"x" * 1000)
    assert (store.get_model(ADA).num_bytes, store.resolve(ADA).revision) == (num_bytes, revision)


def test_the_data_sets_of_all_revisions_are_kept_until_the_model_is_deleted(store: Store, tmp_path: Path) -> None:
    publish(store, seed=1)
    publish(store, seed=2, sha256="0" * 64)
    publish(store, seed=2, sha256="0" * 64)
    for sha256 in (SHA256, "0" * 64):
        assert store.find_dataset(ADA, sha256) is not None
    store.delete_model(ADA)
    assert store.find_dataset(ADA, SHA256) is None
    left = {path.name for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != ".tombstones"}
    assert left == {".lock", INDEX, f"{INDEX}-journal"}


def test_a_model_that_is_not_published_leaves_no_data_set(store: Store, tmp_path: Path) -> None:
    folder = write_tiny_gpt2(store.stage())
    store.keep_dataset(folder, SHA256, LINES)
    store.discard(folder)
    assert not list(tmp_path.rglob("*.jsonl.gz")) and os.listdir(tmp_path / "models/.staging") == []
