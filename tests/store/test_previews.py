"""How models are shown: names, faces, the text that stands for each, and the one that somebody chose instead."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from serve.errors import Conflict, ModelNotFound, StoreUnavailable
from serve.store.previews import read_preview
from serve.store.revisions import Revision, Store
from serve.types import MAX_SAMPLE_CHARS, Catalogue, ModelInfo
from tests.fakes.models import write_tiny_gpt2

ADA = "huggingtweets/ada"
PNG, OTHER = b"\x89PNG one", b"\x89PNG another"
WEBP = b"RIFF\0\0\0\0WEBP"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data", embedded={"fledgling": write_tiny_gpt2(tmp_path / "fledgling", seed=99)})


def publish(store: Store, *, seed: int = 0, num_avatars: int = 0, **facts: object) -> Revision:
    """A finished model, or with `checkpoint_step` a checkpoint, which no alias names."""
    folder = write_tiny_gpt2(store.stage(), seed=seed)
    (folder / "rookery.json").write_text(json.dumps({"handles": ["ada"], "sample": "My dream is tea.", **facts}))
    (folder / "predictions.png").write_bytes(PNG)
    (folder / "avatars").mkdir()
    for number in range(num_avatars):
        (folder / f"avatars/{number}.webp").write_bytes(WEBP + bytes([number]))
    return store.publish(ADA, folder, alias=None if "checkpoint_step" in facts else "main")


def listed(store: Store) -> ModelInfo:
    [info] = [info for info in store.list_models(limit=9).items if info.model_id == ADA]
    return info


# --- What a model says of itself ------------------------------------------------------------------------------


def test_names_and_sample_are_told_where_models_are_listed_and_looked_up(store: Store) -> None:
    publish(store, handles=["ada", "bob"], display_names={"ada": "Ada Lovelace", "bob": "ボブ"}, num_avatars=2)
    for info in (store.get_model(ADA), listed(store), listed(store)):  # the last from the index
        assert info.names == {"ada": "Ada Lovelace", "bob": "ボブ"}
        assert (info.sample, info.num_avatars) == ("My dream is tea.", 2)
    embedded = store.get_model("fledgling")
    assert (embedded.names, embedded.sample, embedded.num_avatars) == ({}, "", 0)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"ada": "A\u202eda\n L\ud800ove\0lace "}, {"ada": "Ada Lovelace"}),
        ({"ada": "\u200d\u200b"}, {}),
        ({"mallory": "Ada", "ada": 7}, {}),
        ({"ada": "x" * 10_000}, {"ada": "x" * 120}),
        (["ada"], {}),
        (None, {}),
    ],
)
def test_names_are_cleaned_and_only_of_handles(store: Store, said: Any, told: dict[str, str]) -> None:
    publish(store, display_names=said)
    assert store.get_model(ADA).names == told


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("My dream\u202e is\n\ntea.\x07", "My dream is tea."),
        (7, ""),
        (None, ""),
        ("x" * 10_000, "x" * MAX_SAMPLE_CHARS),
    ],
)
def test_sample_is_one_clean_line(store: Store, said: Any, told: str) -> None:
    publish(store, sample=said)
    assert store.get_model(ADA).sample == told


# --- Faces ----------------------------------------------------------------------------------------------------


def test_faces_are_found_by_number_and_go_where_the_model_is_copied(store: Store) -> None:
    catalogue: Catalogue = store
    found = publish(store, num_avatars=3)
    for number in range(3):
        assert catalogue.find_avatar(ADA.upper(), number) == found.path / f"avatars/{number}.webp"
    copied = store.import_folder(found.path, "huggingtweets/copy")
    assert copied.revision == found.revision and store.get_model("huggingtweets/copy").num_avatars == 3
    for model_id, number in ((ADA, 3), (ADA, -1), ("fledgling", 0), ("huggingtweets/nobody", 0)):
        with pytest.raises(ModelNotFound):
            catalogue.find_avatar(model_id, number)


@pytest.mark.parametrize("link", ["avatars", "avatars/0.webp"])
def test_a_link_is_no_face(store: Store, tmp_path: Path, link: str) -> None:
    folder = write_tiny_gpt2(tmp_path / "data/models/huggingtweets/dropped")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/0.webp").write_text("x")
    if link == "avatars":
        (folder / link).symlink_to(tmp_path / "secret")
    else:
        (folder / "avatars").mkdir()
        (folder / link).symlink_to(tmp_path / "secret/0.webp")
    assert store.get_model("huggingtweets/dropped").num_avatars == 0
    with pytest.raises(ModelNotFound):
        store.find_avatar("huggingtweets/dropped", 0)


# --- Chosen previews ------------------------------------------------------------------------------------------


def test_chosen_preview_is_shown_by_every_store_and_the_revision_stays_as_it_is(store: Store, tmp_path: Path) -> None:
    catalogue: Catalogue = store
    found, other = publish(store), Store(tmp_path / "data", embedded={})
    assert listed(other).sample == "My dream is tea."  # it has described it
    files = store.list_files(ADA, with_digests=True)

    catalogue.set_preview(ADA.upper(), "My dream is a\u202e sea.", OTHER)

    for one in (store, other, Store(tmp_path / "data", embedded={})):
        assert one.get_model(ADA).sample == listed(one).sample == "My dream is a sea."
        assert one.find_picture(ADA).read_bytes() == OTHER
    assert store.list_files(ADA, with_digests=True) == files
    assert store.get_model(ADA).num_bytes == listed(other).num_bytes == sum(file.num_bytes for file in files)
    assert (found.path / "predictions.png").read_bytes() == PNG
    (store.find_picture(ADA).parent / "preview.json.0123abcd.part").touch()  # of a writer that was killed
    catalogue.set_preview(ADA, "My dream is tea again.", PNG)
    assert store.find_picture(ADA).read_bytes() == PNG and listed(other).sample == "My dream is tea again."
    assert len(list(store.find_picture(ADA).parent.iterdir())) == 2  # nothing of what was before


def test_preview_is_of_one_revision_and_goes_with_it(store: Store, tmp_path: Path) -> None:
    old, new = publish(store, seed=1), publish(store, seed=2, sample="My dream is new.")
    store.set_preview(f"{ADA}@{old.revision[:8]}", "My dream is old.", OTHER)
    assert listed(store).sample == "My dream is new." and store.find_picture(ADA).read_bytes() == PNG
    store.roll_back(ADA, old.revision)
    assert listed(store).sample == "My dream is old." and store.find_picture(ADA).read_bytes() == OTHER
    store.set_preview(f"{ADA}@{new.revision}", "My dream is newer.", OTHER)
    home = tmp_path / "data/models/huggingtweets/ada"
    for found in (old, new):
        assert store.drop_revision(ADA, found.revision)
        assert not (home / ".previews" / found.revision).exists()
    assert not home.exists()


def test_checkpoints_take_their_previews_and_the_home_with_them(store: Store, tmp_path: Path) -> None:
    found = publish(store, checkpoint_step=3)
    store.set_preview(f"{ADA}@{found.revision}", "My dream is half made.", OTHER)
    assert store.drop_checkpoints(ADA) == (found.revision,)
    assert not (tmp_path / "data/models/huggingtweets/ada").exists()


def test_what_is_not_ours_to_change_is_shown_as_it_is(store: Store, tmp_path: Path) -> None:
    write_tiny_gpt2(tmp_path / "data/models/huggingtweets/dropped")
    for model_id in ("Fledgling", "huggingtweets/dropped"):
        with pytest.raises(Conflict):
            store.set_preview(model_id, "My dream is mine.", PNG)
        assert store.get_model(model_id).sample == ""
    for model_id in ("huggingtweets/nobody", f"{ADA}@0000000"):
        with pytest.raises(ModelNotFound):
            store.set_preview(model_id, "My dream is mine.", PNG)


def test_preview_that_cannot_be_kept_leaves_the_one_before(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store)
    store.set_preview(ADA, "My dream is first.", PNG)
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if Path(target).name == "preview.json":
            raise OSError(5, "the disk says no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(StoreUnavailable):
        store.set_preview(ADA, "My dream is second.", OTHER)
    assert store.get_model(ADA).sample == "My dream is first." and store.find_picture(ADA).read_bytes() == PNG


@pytest.mark.parametrize("content", ["", "[]", "{", '{"text": 1}', '{"text": "x", "picture": "../../rookery.json"}'])
def test_damaged_preview_counts_as_never_chosen(store: Store, content: str) -> None:
    found = publish(store)
    store.set_preview(ADA, "My dream is chosen.", OTHER)
    chosen = read_preview(found.path)
    assert chosen is not None
    (chosen.picture.parent / "preview.json").write_text(content)
    assert store.get_model(ADA).sample == "My dream is tea." and store.find_picture(ADA).read_bytes() == PNG
