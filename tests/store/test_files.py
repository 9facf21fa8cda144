"""The files of a revision: which there are, and their digests, computed once."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import threading
from pathlib import Path

import pytest

from serve.errors import NotFound
from serve.store.files import DigestCache, find_file, list_files
from serve.types import RepoFile


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A revision, with much beside it that is no part of it."""
    root = tmp_path / "revision"
    for name in ("config.json", "runs/train.json", ".kept", ".datasets/x", "pytorch_model.bin", "0123456/config.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (tmp_path / "secret").write_text("secret")
    (root / "link.json").symlink_to(tmp_path / "secret")
    (root / "main").symlink_to(root / "0123456")
    (root / "bad\nname").write_text("")
    os.mkfifo(root / "pipe")
    return root


def test_a_revision_has_its_plain_files_alone(folder: Path) -> None:
    assert [file.name for file in list_files(folder, with_digests=False)] == ["config.json", "runs/train.json"]


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "link.json",
        "main/config.json",
        ".kept",
        ".datasets/x",
        "pipe",
        "runs",
        "",
        "/etc/passwd",
        "config.json\0",
    ],
)
def test_a_name_that_is_not_listed_is_no_file(folder: Path, name: str) -> None:
    with pytest.raises(NotFound):
        find_file(folder, name)


def test_digests_are_those_of_sha256sum_and_git(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    for name, content in (("runs/train.json", b"runs/train.json"), ("model.safetensors", None)):
        file = find_file(folder, name)
        git = subprocess.run(
            ["git", "hash-object", "--stdin"], input=content or file.lfs_pointer, capture_output=True, check=True
        )
        assert file.blob_id == git.stdout.decode().strip()
        assert file.sha256 == ("" if content else hashlib.sha256(bytes(range(256))).hexdigest())
        assert file in list_files(folder, with_digests=True)
    assert b"sha256:" + file.sha256.encode() in file.lfs_pointer


def test_a_file_that_became_a_link_or_a_pipe_is_not_opened(folder: Path) -> None:
    file = find_file(folder, "config.json")
    os.close(file.open())
    for become in (lambda path: path.symlink_to(folder / "runs" / "train.json"), os.mkfifo):
        file.location.unlink()
        become(file.location)
        with pytest.raises(FileNotFoundError):
            file.open()


def test_too_many_open_files_do_not_pass_for_a_file_that_is_not_there(folder: Path) -> None:
    file, (soft, hard) = find_file(folder, "config.json"), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            file.open()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_file_is_read_once_however_many_ask_and_again_when_it_changes(tmp_path: Path) -> None:
    path, reads, may_end = tmp_path / "file", list[int](), threading.Event()
    path.write_bytes(b"one")

    def digest(file: RepoFile, descriptor: int) -> tuple[str, str]:
        reads.append(file.num_bytes)
        assert may_end.wait(10)
        return os.pread(descriptor, 10, 0).decode(), ""

    cache, found = DigestCache(digest), list[str]()
    threads = [
        threading.Thread(target=lambda: found.append(cache.fill(RepoFile("file", 0, path)).sha256)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    may_end.set()
    for thread in threads:
        thread.join(10)
    assert found == ["one"] * 8 and reads == [3]
    path.write_bytes(b"other")
    assert cache.fill(RepoFile("file", 0, path)) == RepoFile("file", 5, path, "other") and reads == [3, 5]


def test_a_read_that_fails_is_told_to_all_and_tried_again(tmp_path: Path) -> None:
    path, failures = tmp_path / "file", [OSError("broken")]
    path.write_bytes(b"one")

    def digest(file: RepoFile, descriptor: int) -> tuple[str, str]:
        if failures:
            raise failures.pop()
        return "fine", ""

    cache = DigestCache(digest)
    with pytest.raises(OSError, match="broken"):
        cache.fill(RepoFile("file", 0, path))
    assert cache.fill(RepoFile("file", 0, path)).sha256 == "fine"


def test_what_is_remembered_is_bounded(tmp_path: Path) -> None:
    reads: list[int] = []

    def digest(file: RepoFile, descriptor: int) -> tuple[str, str]:
        reads.append(file.num_bytes)
        return "", ""

    cache = DigestCache(digest, max_entries=2)
    for number in (1, 2, 3, 3, 2, 1):
        path = tmp_path / str(number)
        path.write_bytes(bytes(number))
        os.utime(path, (0, 0))
        cache.fill(RepoFile("file", 0, path))
    assert reads == [1, 2, 3, 1]
