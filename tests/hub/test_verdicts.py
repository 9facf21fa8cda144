"""What could not be served is not fetched again for a quarter of an hour, by any process of the node (F10)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve.errors import ModelUnusable
from serve.hub.fetch import Hub
from serve.hub.verdicts import MAX_VERDICTS, TTL_S, Verdicts
from serve.store.revisions import Store
from tests.fakes.hub import FakeHub, Fault
from tests.fakes.models import write_tiny_gpt2

ADA = "huggingtweets/ada"
WEIGHTS = "model.safetensors"


def open_hub(tmp_path: Path, server: FakeHub) -> Hub:
    """As a process that has just started has it."""
    return Hub(Store(tmp_path / "data", embedded={}), endpoint=server.endpoint, deadline_s=20)


def damaged(folder: Path) -> Path:
    """A model whose weights are as its Hub says, and hold no numbers."""
    write_tiny_gpt2(folder)
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-400:] = b"\xff" * 400  # NaN
    (folder / WEIGHTS).write_bytes(content)
    return folder


def num_downloads(server: FakeHub) -> int:
    return sum("/resolve/" in seen.path for seen in server.requests)


def test_f10_damaged_model_is_fetched_once_by_all_and_leaves_nothing(server: FakeHub, tmp_path: Path) -> None:
    sha = server.add(ADA, damaged(tmp_path / "repo"), tag="v1")
    with pytest.raises(ModelUnusable) as first:
        open_hub(tmp_path, server).locate(ADA)
    num = num_downloads(server)
    for name in (ADA, "HuggingTweets/Ada", f"{ADA}@{sha}", f"{ADA}@v1"):
        with pytest.raises(ModelUnusable) as later:
            open_hub(tmp_path, server).locate(name)
        assert later.value.message == first.value.message
    assert num_downloads(server) == num
    models = tmp_path / "data/models"
    assert {path.name for path in (models / ".fetching").iterdir()} == {"unusable.json", "unusable.lock"}
    assert Store(tmp_path / "data", embedded={}).list_models(limit=9).items == ()


def test_new_commit_and_a_forgotten_verdict_are_tried_at_once(server: FakeHub, tmp_path: Path) -> None:
    server.add(ADA, damaged(tmp_path / "repo"))
    hub = open_hub(tmp_path, server)
    with pytest.raises(ModelUnusable):
        hub.locate(ADA)
    num = num_downloads(server)
    open_hub(tmp_path, server).forget("HuggingTweets/Ada")
    with pytest.raises(ModelUnusable):
        hub.locate(ADA)
    assert num_downloads(server) == 2 * num
    with pytest.raises(ModelUnusable):  # by hand is now
        hub.pull(ADA)
    assert num_downloads(server) == 3 * num
    repaired = server.add(ADA, write_tiny_gpt2(tmp_path / "repaired"))
    assert hub.locate(ADA).revision == repaired


def test_weights_that_never_arrive_as_described_are_tried_twice_and_then_not(server: FakeHub, tmp_path: Path) -> None:
    server.add(ADA, write_tiny_gpt2(tmp_path / "repo"))
    server.fail(ADA, Fault(path=WEIGHTS, prefix="/storage/", body=bytes((tmp_path / f"repo/{WEIGHTS}").stat().st_size)))
    for _ in range(3):
        with pytest.raises(ModelUnusable, match="checksum"):
            open_hub(tmp_path, server).locate(ADA)
    assert sum(seen.path.startswith("/storage/") for seen in server.requests) == 2


def test_verdict_ends_after_a_quarter_of_an_hour_and_the_oldest_make_room(tmp_path: Path) -> None:
    now = 1e9
    verdicts = Verdicts(tmp_path / "x/unusable.json", clock=lambda: now)
    verdicts.add(ADA, "main", ModelUnusable("why"))
    with pytest.raises(ModelUnusable, match="why"):
        Verdicts(tmp_path / "x/unusable.json", clock=lambda: now + TTL_S - 1).check("HUGGINGTWEETS/ADA", "main")
    Verdicts(tmp_path / "x/unusable.json", clock=lambda: now + TTL_S).check(ADA, "main")
    for number in range(MAX_VERDICTS):
        now += 0.1
        verdicts.add(f"x/m{number}", "main", ModelUnusable("why"))
    verdicts.check(ADA, "main")  # made room
    with pytest.raises(ModelUnusable):
        verdicts.check("x/m0", "main")


@pytest.mark.parametrize("character", ["\u00e9", "\U0001f426", "\x01", '"', "\ud800"])
def test_as_many_long_verdicts_as_there_may_be_are_all_read_again(tmp_path: Path, character: str) -> None:
    verdicts = Verdicts(tmp_path / "unusable.json", clock=lambda: 1e9)
    path = tmp_path / "unusable.json"
    entry = [1e9 + TTL_S, character * 300]
    path.write_text(json.dumps({f"x/m{number}@main": entry for number in range(MAX_VERDICTS)}))
    verdicts.add(ADA, "main", ModelUnusable(character * 100_000))
    for model_id in (ADA, "x/m1", f"x/m{MAX_VERDICTS - 1}"):
        with pytest.raises(ModelUnusable) as caught:
            Verdicts(path, clock=lambda: 1e9).check(model_id, "main")
        assert caught.value.message == character * 300
    verdicts.check("x/m0", "main")  # made room


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', '{"huggingtweets/ada@main": [1e99, 3]}', "[" * 100_000])
def test_damaged_file_of_verdicts_is_an_empty_one(tmp_path: Path, content: str) -> None:
    (tmp_path / "unusable.json").write_text(content)
    verdicts = Verdicts(tmp_path / "unusable.json")
    verdicts.check(ADA, "main")
    verdicts.add(ADA, "main", ModelUnusable("why"))
    with pytest.raises(ModelUnusable):
        verdicts.check(ADA, "main")
