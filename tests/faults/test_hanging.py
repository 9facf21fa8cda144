"""The disk that stops to answer does so, and gives back what it took the place of."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.faults.hanging import hanging

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access("/dev/fuse", os.W_OK), reason="mounts a file system: needs root and /dev/fuse"
)


def test_a_read_waits_until_it_is_let_go_and_gets_the_file_s_bytes(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    content = os.urandom(300_000)
    path.write_bytes(content)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()), daemon=True)
    with hanging({path: 140_000}):
        assert path.is_file() and path.stat().st_size == len(content)
        with path.open("rb") as file:
            assert file.read(1000) == content[:1000]
        reader.start()
        reader.join(0.3)
        assert found == []
    reader.join(30)
    assert found == [content] and path.read_bytes() == content
