from __future__ import annotations

import stat
from pathlib import Path

import pytest

from loadtest import models
from loadtest.models import SHAPES, write_linked_models


def test_many_models_take_the_disk_of_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_MAX_LINKS", 4)
    ids = write_linked_models(tmp_path, 9, shape=SHAPES["tiny"], num_distinct=2)
    assert ids == [f"bench/m{number:05}" for number in range(9)]
    weights = [tmp_path / "models" / model_id / "model.safetensors" for model_id in ids]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o444 for path in weights)
    assert [path.stat().st_ino == weights[0].stat().st_ino for path in weights[:4]] == [True, False, True, False]
    assert len({path.read_bytes() for path in weights}) == 2
    # Of five models with the first weights four are links of one file, and the fifth begins another.
    assert len({path.stat().st_ino for path in weights}) == 3

    before = weights[0].stat().st_mtime_ns
    assert write_linked_models(tmp_path, 10, shape=SHAPES["tiny"], num_distinct=2)[:9] == ids
    assert weights[0].stat().st_mtime_ns == before
