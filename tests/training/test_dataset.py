"""Splits, cyborgs, previews and names."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from huggingface_hub.utils._validators import validate_repo_id

from serve.errors import InvalidRequest, ModelNotFound, TooFewTweets
from serve.training.archives import Archive, Post
from serve.training.dataset import build_dataset, epoch_texts, merge_archives, model_name, preview
from serve.training.preprocess import MAX_VALIDATION_TEXTS, preprocess
from serve.types import FileRecord, ModelId

ADA = [f"ada writes number {i}" for i in range(100)]
BOB = [f"bob writes number {i}" for i in range(30)]


def test_a_handle_is_split_into_train_and_held_out_without_loss() -> None:
    dataset = build_dataset({"ada": ADA}, seed=1)
    assert sorted(dataset.train + dataset.held_out) == sorted(ADA)
    assert dataset.counts == {"ada": {"kept": 100, "train": 90, "held_out": 10}}


def test_a_text_posted_twice_is_never_on_both_sides() -> None:
    dataset = build_dataset({"ada": ADA * 3}, seed=1)
    assert not set(dataset.train) & set(dataset.held_out)


def test_the_split_depends_on_the_seed_and_not_on_the_order() -> None:
    first = build_dataset({"ada": ADA}, seed=1)
    assert set(build_dataset({"ada": ADA[::-1]}, seed=1).held_out) == set(first.held_out)
    assert set(build_dataset({"ada": ADA}, seed=2).held_out) != set(first.held_out)
    assert build_dataset({"ada": ADA}, seed=1) == first


def test_in_a_cyborg_the_shorter_handle_is_repeated_up_to_the_longest() -> None:
    dataset = build_dataset({"ada": ADA, "bob": BOB}, seed=1)
    by_author = Counter(text.split()[0] for text in dataset.train)
    assert by_author == {"ada": 90, "bob": 90}
    of_bob = Counter(text for text in dataset.train if text.startswith("bob"))
    assert len(of_bob) == 27
    assert set(of_bob.values()) <= {3, 4}
    assert dataset.counts["bob"] == {"kept": 30, "train": 27, "held_out": 3}


@pytest.mark.parametrize(("texts", "num_train"), [([], 0), (["a b c"], 1), (["a b c", "d e f"], 1)])
def test_tiny_handles_still_train(texts: list[str], num_train: int) -> None:
    assert len(build_dataset({"ada": texts}, seed=1).train) == num_train


def test_nothing_is_held_out_when_nothing_is_asked_for() -> None:
    assert build_dataset({"ada": ADA}, seed=1, held_out_share=0).held_out == ()


def test_a_share_that_leaves_too_little_to_train_on_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="held_out_share"):
        build_dataset({"ada": ADA}, seed=1, held_out_share=0.9)


def test_epochs_are_the_same_texts_in_orders_of_their_own() -> None:
    dataset = build_dataset({"ada": ADA}, seed=1)
    first, second = epoch_texts(dataset, 1, 0), epoch_texts(dataset, 1, 1)
    assert sorted(first) == sorted(second) == sorted(dataset.train)
    assert first != second
    assert first == epoch_texts(dataset, 1, 0)


def _archive(handle: str | None, *ids: str) -> Archive:
    return Archive(handle, None, "csv", tuple(Post(i, f"post number {i}", False, None) for i in ids))


def test_two_archives_of_one_person_are_one_and_count_a_post_once() -> None:
    merged = merge_archives([_archive("Ada", "1", "2"), _archive("ada", "2", "3"), _archive("bob", "9")])
    assert list(merged) == ["Ada", "bob"]
    assert [post.id for post in merged["Ada"].posts] == ["1", "2", "3"]
    assert merged["Ada"].left_out == {"duplicate": 1}


def _write_tweets(path: Path, handle: str, start: int, num: int) -> Path:
    rows = [f"{start + i},{handle},{handle} wrote the post {start + i}" for i in range(num)]
    path.write_text("\n".join(["id,username,text", *rows, f"{start + num},{handle},RT @x: hello"]) + "\n")
    return path


def test_a_preview_of_one_archive_has_its_counts_and_samples(tmp_path: Path) -> None:
    report = preview([_write_tweets(tmp_path / "a.csv", "Ada", 0, 20)], None)
    kept = sorted(f"Ada wrote the post {i}" for i in range(20))
    samples = report.pop("samples")
    assert report == {
        "handle": "Ada",
        "display_name": None,
        "format": "csv",
        "downloaded": 21,
        "retweets": 1,
        "short": 0,
        "kept": 20,
        "status": "too_few",
        "kept_sorted_sha256": hashlib.sha256("\n".join(kept).encode()).hexdigest(),
        "left_out": {},
        "reasons": {},
        "warnings": ["There are 657 characters of usable text; training needs at least 6,000."],
    }
    assert len(samples) == 8
    assert set(samples) <= set(kept)


def test_a_preview_of_several_people_sums_them_up(tmp_path: Path) -> None:
    ada, bob = _write_tweets(tmp_path / "a.csv", "Zoe", 0, 20), _write_tweets(tmp_path / "b.csv", "Bob", 100, 10)
    lines = tmp_path / "c.txt"
    lines.write_text("one two three\n")
    report = preview([ada, bob, lines], [None, "Rob", "@Cy"])
    assert (report["handle"], report["format"]) == ("Cy-Rob-Zoe", "csv+text")
    assert (report["downloaded"], report["retweets"], report["kept"]) == (33, 2, 31)
    assert [part["kept"] for part in report["archives"]] == [20, 10, 1]
    json.dumps(report)


def test_a_preview_takes_the_handle_that_the_user_gives(tmp_path: Path) -> None:
    assert preview([_write_tweets(tmp_path / "a.csv", "Ada", 0, 2)], "@Eve")["handle"] == "Eve"


def test_a_preview_writes_one_persons_handle_the_same_for_one_archive_and_for_two(tmp_path: Path) -> None:
    archives = [_write_tweets(tmp_path / "a.csv", "Ada", 0, 2), _write_tweets(tmp_path / "b.csv", "ada", 10, 2)]
    assert preview(archives[:1], None)["handle"] == preview(archives, None)["handle"] == "Ada"


def test_a_preview_guesses_no_handle_as_training_guesses_none(tmp_path: Path) -> None:
    (tmp_path / "ada_l.txt").write_text("one two three\n")
    report = preview([tmp_path / "ada_l.txt"])
    assert report["handle"] is None and "give a handle" in report["warnings"][0]


def test_a_preview_with_more_handles_than_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="2 handles for 1 archives"):
        preview([_write_tweets(tmp_path / "a.csv", "Ada", 0, 2)], ["ada", "bob"])


def _record(path: Path, *texts: str) -> FileRecord:
    path.write_text("\n".join(texts))
    return FileRecord(path.stem, path.name, path.stat().st_size, 1, "fine-tune", path)


SAID = [f"this is what she said on the day {i} of her long life" for i in range(300)]


def test_nobody_learns_from_a_text_of_the_validation_file(tmp_path: Path) -> None:
    train, judge = _record(tmp_path / "a.txt", *SAID, "too short"), _record(tmp_path / "b.txt", *SAID[:50])
    data = preprocess([(train, "@ada@social.example")], validation=judge)
    assert data.handles == ("ada.social.example",)
    [person] = data.people
    assert person.cleaned.counts == {"downloaded": 301, "retweets": 0, "short": 1, "set_aside": 50, "kept": 250}
    assert data.validation is not None and not set(data.validation.kept) & set(person.cleaned.kept)


@pytest.mark.parametrize("num_shared", [299, 300])
def test_a_file_that_is_nearly_all_in_the_validation_file_is_refused_at_once(tmp_path: Path, num_shared: int) -> None:
    train, judge = _record(tmp_path / "a.txt", *SAID), _record(tmp_path / "b.txt", *SAID[:num_shared])
    with pytest.raises(TooFewTweets, match=f"{num_shared} are in the validation file too"):
        preprocess([(train, "ada")], validation=judge)


def test_of_a_large_validation_file_a_sample_is_used_whatever_its_order(tmp_path: Path) -> None:
    many = [f"she also said this, as number {i}" for i in range(2_500)]
    train = _record(tmp_path / "a.txt", *SAID)
    first, second = (
        preprocess([(train, "ada")], validation=_record(tmp_path / "b.txt", *texts)).validation
        for texts in (many * 2, many[::-1])
    )
    assert first is not None and second is not None
    assert first.kept == second.kept and len(set(first.kept)) == MAX_VALIDATION_TEXTS
    assert (first.set_aside, second.set_aside) == (3_000, 500)


def test_a_preview_refuses_what_is_no_handle(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="handle"):
        preview([_write_tweets(tmp_path / "a.csv", "Ada", 0, 2)], "Ünï")


def test_a_preview_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        preview([], None)


@pytest.mark.parametrize(
    ("handles", "name"),
    [
        (["SenSanders"], "huggingtweets/sensanders"),
        (["Bob", "ada", "BOB"], "huggingtweets/ada-bob"),
        (["_under_"], "huggingtweets/_under_"),
        (["@RT_Erdogan"], "huggingtweets/rt_erdogan"),
        (["ada.bsky.social"], "huggingtweets/ada.bsky.social"),
    ],
)
def test_a_model_is_named_after_its_people_and_the_hub_takes_the_name(handles: list[str], name: str) -> None:
    assert model_name(handles) == name
    validate_repo_id(name)


@pytest.mark.parametrize(
    "handles",
    [
        [],
        [""],
        ["a b"],
        ["a/b"],
        ["../x"],
        ["a" * 16],
        ["ада"],
        ["a--b.social"],
        ["ada.git"],
        ["a" * 15] + [f"{'b' * 13}{i:02}" for i in range(9)],
    ],
)
def test_what_is_no_handle_or_makes_no_name_is_refused(handles: list[str]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        model_name(handles)
    assert refused.value.param == "handle"


@pytest.mark.parametrize("part", ["-a", ".a", "a-", "a.", "a..b", "a--b", "a.git", "a b", "", "ä", "a\n", "_" * 97])
def test_what_the_hub_refuses_is_no_model_id(part: str) -> None:
    with pytest.raises(ModelNotFound):
        ModelId.parse(f"huggingtweets/{part}")
