"""Each peer, really started over tiny models, answers in the right length, more models than fit included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from loadtest.client.run import run_plan
from loadtest.models import SHAPES
from loadtest.peers import command, fleet
from loadtest.peers.command import NAMES, Options
from loadtest.peers.fleet import Fleet
from loadtest.peers.llamacpp import VERSION
from loadtest.peers.peer import Peer, PeerUnavailableError

BUILT = Path.home() / ".cache" / "rookery-peers"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fleet.written(tmp_path_factory.mktemp("cache"), shape=SHAPES["tiny"], num_distinct=2)


@pytest.fixture
def models(kept: Path, tmp_path: Path) -> Fleet:
    return fleet.linked(kept, tmp_path / "data", 4)


def peer_of(name: str, scratch: Path) -> Peer:
    if name == "llamacpp" and not (BUILT / f"llama_cpp_python-{VERSION}" / "build" / "bin" / "llama-server").exists():
        pytest.skip("llama-server is not built here: make bench-peers builds it")
    (peer,) = command.make_peers(Options(names=(name,), cache=BUILT), scratch)
    return peer


@pytest.mark.parametrize("name", NAMES)
async def test_a_peer_answers_every_request_in_the_length_that_was_asked(
    name: str, models: Fleet, tmp_path: Path
) -> None:
    peer = peer_of(name, tmp_path)
    options = Options(counts=(4,), memory=2, rate=4.0)
    try:
        target = peer.start(models, memory=2)
        warm = await run_plan(command.warm_plan(options, 4), target, models=models.ids)
        run = await run_plan(command.light_plan(options, 4, seed=1, duration_s=1.0), target, models=models.ids)
        assert {record.outcome for record in (*warm.records, *run.records)} == {"ok"}
        assert all(8 <= record.output_tokens <= 24 for record in run.records)
        assert all(record.first_s is not None and record.first_s <= record.ended_s for record in run.records)
        assert peer.num_loads() >= 2
        assert peer.memory_bytes() > 10 << 20
    finally:
        peer.stop()
    assert peer.memory_bytes() == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(target.url, timeout=5)


def test_a_peer_that_ends_at_once_says_so(models: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    peer = peer_of("lru", tmp_path)
    with pytest.raises(PeerUnavailableError, match="status 1"):
        peer.start(models, memory=2)
    peer.stop()


def test_the_command_ends_with_a_line_of_json_an_object_a_server(kept: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "loadtest", "peers", "--tiny", "--models", "1,3", "--memory", "2", "--rounds", "1",
            "--only", "lru,transformers", "--budget-s", "120", "--markdown", "--cache", str(kept.parent),
        ],
        capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    *report, last = done.stdout.strip().splitlines()
    found = json.loads(last)
    assert found.keys() == {"lru", "transformers"}
    assert found["lru"]["tokens_s_3"] > 0
    assert found["lru"]["errors"] == 0
    assert any(line.startswith("| 3 | transformers (no limit) |") for line in report)
