"""The history of a model: its revisions, which of them is served, and the checkpoints that come and go."""

from __future__ import annotations

import json
import mmap
import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from serve.errors import Conflict, InvalidRequest, ModelNotFound
from serve.store.revisions import Revision, Store
from serve.store.validate import check_folder
from serve.types import Catalogue
from tests.fakes.models import write_tiny_gpt2

ADA = "huggingtweets/ada"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data", embedded={"fledgling": write_tiny_gpt2(tmp_path / "fledgling", seed=99)})


def publish(store: Store, *, seed: int, **facts: object) -> Revision:
    """A finished model, or with `checkpoint_step` a checkpoint, which no alias names."""
    folder = write_tiny_gpt2(store.stage(), seed=seed)
    (folder / "rookery.json").write_text(json.dumps({"created_at": 1_700_000_000, **facts}))
    return store.publish(ADA, folder, alias=None if "checkpoint_step" in facts else "main")


def revisions(store: Store) -> list[str]:
    return [info.revision for info in store.list_revisions(ADA)]


# --- Listing --------------------------------------------------------------------------------------------------


def test_revisions_are_listed_newest_first_with_what_they_say_of_themselves(store: Store) -> None:
    first = publish(store, seed=1, job_id="ftjob-1", losses={"train": 2.5, "held_out_before": None, "x": 10**400})
    half_way = publish(store, seed=2, job_id="ftjob-2", checkpoint_step=12)
    last = publish(store, seed=3, job_id="ftjob-2")

    listed = store.list_revisions("HuggingTweets/Ada")

    assert [info.revision for info in listed] == [last.revision, half_way.revision, first.revision]
    assert [info.is_main for info in listed] == [True, False, False]
    assert [info.step for info in listed] == [None, 12, None]
    assert [info.job_id for info in listed] == ["ftjob-2", "ftjob-2", "ftjob-1"]
    assert listed[2].losses == {"train": 2.5} and listed[2].created_at == 1_700_000_000
    assert {info.model_id for info in listed} == {ADA}
    assert listed[0].num_bytes == sum(path.stat().st_size for path in last.path.iterdir())


def test_a_checkpoint_is_served_by_its_revision_and_changes_nothing_else(store: Store) -> None:
    checkpoint = publish(store, seed=1, checkpoint_step=3)
    with pytest.raises(ModelNotFound):
        store.resolve(ADA)
    assert store.list_models(limit=9).items[0].model_id == "fledgling" and len(store.list_models(limit=9).items) == 1
    assert store.resolve(f"{ADA}@{checkpoint.revision}") == checkpoint
    assert [(info.is_main, info.step) for info in store.list_revisions(ADA)] == [(False, 3)]

    final = publish(store, seed=2)
    later = publish(store, seed=3, checkpoint_step=3)
    assert store.resolve(ADA) == final and store.resolve(f"{ADA}@{later.revision}") == later


def test_models_that_were_not_trained_here_have_one_revision(store: Store, tmp_path: Path) -> None:
    write_tiny_gpt2(tmp_path / "data/models/huggingtweets/dropped")
    for model_id in ("huggingtweets/dropped", "fledgling"):
        [only] = store.list_revisions(model_id)
        assert only.is_main and only.revision == store.resolve(model_id).revision


def test_an_unknown_model_has_no_revisions(store: Store) -> None:
    (store.resolve("fledgling").path.parent / "data/models/huggingtweets/empty").mkdir(parents=True)
    for model_id in ("huggingtweets/nobody", "huggingtweets/empty", "a/../b"):
        with pytest.raises(ModelNotFound):
            store.list_revisions(model_id)
    with pytest.raises(InvalidRequest, match="without '@' and a version"):
        store.list_revisions("fledgling@main")


# --- Short names ----------------------------------------------------------------------------------------------


def test_a_revision_may_be_called_by_how_it_begins(store: Store, tmp_path: Path) -> None:
    old, new = publish(store, seed=1), publish(store, seed=2)
    dropped = write_tiny_gpt2(tmp_path / "data/models/huggingtweets/dropped")
    for length in (7, 8, 39, 40):
        assert store.resolve(f"{ADA}@{old.revision[:length]}") == old
        assert store.resolve(f"{ADA}@{new.revision[:length].upper()}") == new
    for whole in (store.resolve("fledgling"), store.resolve("huggingtweets/dropped")):
        assert store.resolve(f"{whole.model_id}@{whole.revision[:7]}") == whole
    assert store.resolve("huggingtweets/dropped").path == dropped
    for wrong in (old.revision[:6], "0000000", old.revision + "0", ".datasets"):
        with pytest.raises(ModelNotFound):
            store.resolve(f"{ADA}@{wrong}")


def test_a_beginning_that_two_revisions_share_names_neither(store: Store) -> None:
    for seed, revision in ((1, "abcdef01" * 5), (2, "abcdef02" * 5)):
        store.publish(ADA, write_tiny_gpt2(store.stage(), seed=seed), revision=revision)
    with pytest.raises(ModelNotFound, match="2 revisions of 'huggingtweets/ada' begin with 'abcdef0'"):
        store.resolve(f"{ADA}@abcdef0")
    assert store.resolve(f"{ADA}@abcdef02").revision == "abcdef02" * 5


# --- Rolling back ---------------------------------------------------------------------------------------------


def test_main_goes_back_and_forth_and_the_order_stays(store: Store) -> None:
    catalogue: Catalogue = store
    old, new = publish(store, seed=1), publish(store, seed=2)

    assert catalogue.roll_back("HuggingTweets/ADA", old.revision[:7]).revision == old.revision
    assert store.resolve(ADA) == old and store.get_model(ADA).revision == old.revision
    assert [(info.revision, info.is_main) for info in store.list_revisions(ADA)] == [
        (new.revision, False),
        (old.revision, True),
    ]
    assert catalogue.roll_back(ADA, new.revision).is_main
    assert store.resolve(ADA) == new


def test_only_whole_models_of_this_id_become_main(store: Store, tmp_path: Path) -> None:
    whole, checkpoint = publish(store, seed=1), publish(store, seed=2, checkpoint_step=3)
    with pytest.raises(Conflict, match="checkpoint"):
        store.roll_back(ADA, checkpoint.revision)
    with pytest.raises(Conflict):
        store.roll_back("fledgling", store.resolve("fledgling").revision)
    for revision in ("0" * 40, whole.revision[:6], "", "..", "a@b", "../../x"):
        with pytest.raises(ModelNotFound):
            store.roll_back(ADA, revision)
    with pytest.raises(ModelNotFound):
        store.roll_back("huggingtweets/nobody", whole.revision)
    assert store.resolve(ADA) == whole

    dropped = write_tiny_gpt2(tmp_path / "data/models/huggingtweets/dropped")
    by_hand = store.resolve("huggingtweets/dropped").revision
    assert store.roll_back("huggingtweets/dropped", by_hand).is_main and not (dropped / "main").exists()
    store.publish("huggingtweets/dropped", write_tiny_gpt2(store.stage(), seed=5))
    with pytest.raises(Conflict, match="by hand"):
        store.roll_back("huggingtweets/dropped", by_hand)


def test_readers_meet_a_whole_model_whatever_main_does(store: Store) -> None:
    names = [publish(store, seed=seed).revision for seed in (1, 2)]
    failures: list[BaseException] = []
    met: set[str] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                found = store.resolve(ADA)
                check_folder(found.path)
                met.add(found.revision)
            except BaseException as exc:
                failures.append(exc)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for number in range(100):
            store.roll_back(ADA, names[number % 2])
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert not failures and met <= set(names)


# --- Checkpoints that are over --------------------------------------------------------------------------------


def test_checkpoints_of_other_trainings_are_removed_while_their_readers_go_on(store: Store, tmp_path: Path) -> None:
    old = publish(store, seed=1, job_id="ftjob-1", checkpoint_step=3)
    first = publish(store, seed=2, job_id="ftjob-1")
    own = publish(store, seed=3, job_id="ftjob-2", checkpoint_step=3)
    tagged = publish(store, seed=4, job_id="ftjob-1", checkpoint_step=6)
    store.set_alias(tagged, "favourite")
    second = publish(store, seed=5, job_id="ftjob-2")

    weights = old.path / "model.safetensors"
    before = weights.read_bytes()
    with weights.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert store.drop_checkpoints(ADA, keep=[own.revision]) == (old.revision,)
        assert mapped[:] == before

    assert revisions(store) == [one.revision for one in (second, tagged, own, first)]
    with pytest.raises(ModelNotFound):
        store.resolve(f"{ADA}@{old.revision}")
    assert store.drop_checkpoints(ADA) == (own.revision,)
    assert store.drop_checkpoints("huggingtweets/nobody") == ()
    assert store.resolve(ADA) == second and os.listdir(tmp_path / "data/models/.staging") == []


def test_checkpoints_of_a_training_that_goes_on_are_spared(store: Store) -> None:
    over = publish(store, seed=1, job_id="ftjob-1", checkpoint_step=3)
    going_on = publish(store, seed=2, job_id="ftjob-2", checkpoint_step=3)
    assert store.drop_checkpoints(ADA, spare=["ftjob-2"]) == (over.revision,)
    assert revisions(store) == [going_on.revision]


def test_data_set_goes_with_the_last_revision(store: Store, tmp_path: Path) -> None:
    folder = write_tiny_gpt2(store.stage(), seed=1)
    (folder / "rookery.json").write_text(json.dumps({"job_id": "ftjob-1", "checkpoint_step": 3}))
    store.keep_dataset(folder, "ab" * 32, ["secret"])
    store.publish(ADA, folder, alias=None)
    home = tmp_path / "data/models/huggingtweets/ada"
    assert (home / ".datasets").is_dir()
    store.drop_checkpoints(ADA, of_job="ftjob-1")
    assert not home.exists()


def test_imported_checkpoint_is_a_whole_model(store: Store) -> None:
    made = publish(store, seed=1, job_id="ftjob-1", checkpoint_step=3)
    copied = store.import_folder(made.path, "huggingtweets/copy")
    assert store.drop_checkpoints("huggingtweets/copy") == ()
    assert store.roll_back("huggingtweets/copy", copied.revision).step is None


def test_settling_moves_main_only_from_where_it_was(store: Store) -> None:
    first, second, third = (publish(store, seed=seed) for seed in (1, 2, 3))
    assert store.main_of(ADA) == third.revision and store.main_of("huggingtweets/nobody") is None
    assert store.settle(ADA, "0" * 40, main_before=None) is None
    assert store.settle(ADA, first.revision, main_before=second.revision) == first
    assert store.main_of(ADA) == third.revision
    assert store.settle(ADA, first.revision, main_before=third.revision) == first
    assert store.main_of(ADA) == first.revision


def test_staged_folder_of_a_dead_process_is_swept_and_of_a_living_one_stays(store: Store) -> None:
    mine = store.stage()
    with subprocess.Popen(["true"]) as dead:
        pass
    theirs = mine.with_name(f"{socket.gethostname()}:{dead.pid}.1.abc")
    theirs.mkdir()
    store.sweep()
    assert mine.is_dir() and not theirs.exists()


def test_a_model_is_listed_whatever_checkpoints_come_and_go(store: Store) -> None:
    main = publish(store, seed=1)
    failures: list[BaseException] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            try:
                assert [info for info in store.list_revisions(ADA) if info.is_main][0].revision == main.revision
                store.resolve(f"{ADA}@{main.revision[:7]}")
            except BaseException as exc:
                failures.append(exc)

    reader = threading.Thread(target=look)
    reader.start()
    dropped = 0
    try:
        for step in range(30):
            publish(store, seed=2, checkpoint_step=step)
            dropped += len(store.drop_checkpoints(ADA)) if step % 3 == 2 else 0
    finally:
        done.set()
        reader.join()
    assert dropped == 30
    assert not failures and revisions(store) == [main.revision]


# --- Pictures -------------------------------------------------------------------------------------------------


def test_the_picture_of_a_revision_is_found_the_better_one_first(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no preview picture"):
        store.find_picture("fledgling")
    found = []
    for seed, names in enumerate([("thumbnail.png",), ("thumbnail.png", "predictions.png")]):
        folder = write_tiny_gpt2(store.stage(), seed=seed)
        for name in names:
            (folder / name).write_bytes(b"\x89PNG")
        found.append(store.publish(ADA, folder))
    assert store.find_picture(ADA) == found[1].path / "predictions.png"
    assert store.find_picture(f"{ADA}@{found[0].revision[:8]}") == found[0].path / "thumbnail.png"
    copied = store.import_folder(found[1].path, "huggingtweets/copy")
    assert store.find_picture("huggingtweets/copy") == copied.path / "predictions.png"


def test_a_link_is_no_picture(store: Store, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    folder = write_tiny_gpt2(tmp_path / "data/models/huggingtweets/dropped")
    (folder / "predictions.png").symlink_to(secret)
    with pytest.raises(ModelNotFound):
        store.find_picture("huggingtweets/dropped")
