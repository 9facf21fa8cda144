"""Repositories made to do harm: each is refused as a bad upload, soon, and without going on for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.archive_files import Car, repository, varint
from tests.training.uploads import read_or_refuse, refusal


def car_refusal(tmp_path: Path, content: bytes) -> str:
    (tmp_path / "repo.car").write_bytes(content)
    return refusal(tmp_path / "repo.car")


def test_a_block_that_is_not_what_its_hash_says_is_refused(tmp_path: Path) -> None:
    content = repository({"3lbk4zvhrgc2k": "mine"})
    assert "not what its hash says" in car_refusal(tmp_path, content.replace(b"mine", b"fine"))


def test_a_repository_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    content = repository({"3lbk4zvhrgc2k": "mine"})
    for length in range(70, len(content), 7):
        car_refusal(tmp_path, content[:length])


def test_a_tree_that_names_a_node_twice_is_refused_and_not_gone_into_for_ever(tmp_path: Path) -> None:
    car = Car()
    tree = car.node({})
    for _ in range(40):  # each level names the one below twice: 2^40 ways
        tree = car.node({"app.bsky.feed.post/a": car.put({"text": "a"})}, left=tree, after=tree)
    assert "twice" in car_refusal(tmp_path, car.finish(tree))


def test_a_tree_of_too_many_levels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.training.archives.car._MAX_PENDING", 5_000)
    car = Car()
    cid, tree = car.put({"text": "a"}), car.node({})
    for number in range(5_100):
        tree = car.node({f"app.bsky.feed.post/{number:06}": cid}, left=tree)
    assert "too deep" in car_refusal(tmp_path, car.finish(tree))


def test_a_repository_of_nonsense_is_refused(tmp_path: Path) -> None:
    start = repository({"3lbk4zvhrgc2k": "mine"})[:100]
    header = start[: 1 + start[0]]
    for rest in (
        b"",
        b"\xff" * 20,
        b"\x00",
        varint(2**62) + b"x",
        varint(40) + bytes(40),
        varint(2**24) + bytes(2**24),
    ):
        car_refusal(tmp_path, header + rest)


def test_blocks_nested_too_deep_or_of_the_wrong_shape_are_read_or_refused(tmp_path: Path) -> None:
    for block in (b"\x81" * 200_000 + b"\x01", b"\xa0", b"\x81\x01", b"\x9b" + b"\xff" * 8):
        car = Car()
        read_or_refuse(tmp_path / "repo.car", car.finish(car.put_bytes(block)))


@pytest.mark.parametrize(
    "entry",
    [
        {"p": 5, "k": b"x", "v": b"", "t": None},
        {"p": -1, "k": b"x", "v": b"", "t": None},
        {"p": 0, "k": b"\xff", "v": b"", "t": None},
        {"p": 0, "k": b"x" * 2_000, "v": b"", "t": None},
        {"p": "0", "k": 7, "v": None, "t": 5},
        7,
    ],
)
def test_entries_of_any_shape_are_read_or_refused(tmp_path: Path, entry: object) -> None:
    car = Car()
    read_or_refuse(tmp_path / "repo.car", car.finish(car.put({"l": None, "e": [entry, entry]})))
