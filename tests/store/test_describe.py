"""What a folder says of itself is kept within bounds, whoever made it."""

from __future__ import annotations

import json
from pathlib import Path

from serve.store.describe import describe, describe_revision
from tests.fakes.models import write_tiny_gpt2

ADA, REVISION = "huggingtweets/ada", "0" * 40


def write_model(folder: Path, **facts: object) -> Path:
    write_tiny_gpt2(folder)
    (folder / "rookery.json").write_text(json.dumps(facts))
    return folder


def test_only_numbers_that_can_be_counts_are_counts(tmp_path: Path) -> None:
    counts = {"downloaded": 2**53 - 1, "retweets": 2**53, "short": -1, "kept": 10**4000, "more": 1}
    folder = write_model(tmp_path / "m", counts={"ada": counts, "bob": {"kept": True}}, checkpoint_step=10**400)
    assert describe(ADA, REVISION, folder).counts == {"ada": {"downloaded": 2**53 - 1}, "bob": {}}
    assert describe_revision(ADA, REVISION, folder, is_main=False).step is None


def test_no_model_has_more_handles_or_longer_ones_than_can_be_shown(tmp_path: Path) -> None:
    handles = [f"{number:03}" + "x" * 300 for number in range(100)]
    folder = write_model(
        tmp_path / "m",
        handles=handles,
        display_names=dict.fromkeys([*handles, *(handle[:256] for handle in handles)], "N" * 5000),
        counts={handle: {"kept": 1} for handle in handles},
        tags=handles,
        base_model="b" * 5000,
        losses=dict.fromkeys(handles, 1.0),
        job_id="j" * 5000,
    )
    info, line = describe(ADA, REVISION, folder), describe_revision(ADA, REVISION, folder, is_main=True)
    wanted = tuple(handle[:256] for handle in handles[:16])
    assert info.handles == info.tags == tuple(info.counts) == tuple(info.names) == tuple(line.losses) == wanted
    assert max(map(len, info.names.values())) <= 256
    assert len(info.base_model or "") == len(line.job_id or "") == 256
