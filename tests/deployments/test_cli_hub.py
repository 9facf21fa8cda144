"""The command line's push and pull, between a server over a real store and a Hub on the loopback."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from serve.types import Visibility
from tests.deployments.cli_world import HubWorld, Rookery
from tests.fakes.hub import Fault
from tests.fakes.models import write_tiny_gpt2

_sends_files = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own way


@_sends_files
def test_a_model_goes_to_the_hub_and_comes_back_the_same(rookery: Rookery, hub_world: HubWorld, tmp_path: Path) -> None:
    revision = hub_world.store.import_folder(write_tiny_gpt2(tmp_path / "tiny", seed=4), "huggingtweets/wren")
    before = hub_world.weights("huggingtweets/wren")
    pushed = rookery("push", "huggingtweets/wren", "--json")
    assert pushed.code == 0, pushed.err
    told = json.loads(pushed.out)
    assert set(told) == {"repo", "url", "commit", "tag", "uploaded_bytes", "skipped"}
    assert (told["repo"], told["tag"]) == ("lina/wren", f"rookery-{revision.revision[:12]}")
    assert told["uploaded_bytes"] > len(before) and not told["skipped"]
    assert rookery("rm", "huggingtweets/wren").code == 0
    pulled = rookery("pull", "lina/wren", "--json")
    assert pulled.code == 0, pulled.err
    assert (json.loads(pulled.out)["id"], json.loads(pulled.out)["revision"]) == ("lina/wren", told["commit"])
    assert hub_world.weights("lina/wren") == before
    assert rookery("pull", f"lina/wren@{told['tag']}").code == 0
    assert hub_world.weights(f"lina/wren@{told['tag']}") == before


@_sends_files
def test_push_and_pull_say_in_a_line_what_they_did_and_on_stderr_how_far_they_are(
    rookery: Rookery, hub_world: HubWorld, tmp_path: Path
) -> None:
    hub_world.store.import_folder(write_tiny_gpt2(tmp_path / "tiny"), "lina/wren")
    first, second = (rookery("push", "lina/wren") for _ in range(2))
    assert re.fullmatch(r"lina/wren is now at http://\S+/lina/wren as rookery-[0-9a-f]{12}\.\n", first.out)
    assert second.out == first.out.replace("is now at", "was already at")
    assert [line.split()[0] for line in first.err.splitlines()][:2] == ["looking", "fetching"]
    assert "uploading" in first.err and "committing" in first.err
    assert second.err == "looking\n"
    newer = write_tiny_gpt2(tmp_path / "newer", seed=1)
    commit = hub_world.hub.add("lina/wren", newer)
    pulled = rookery("pull", "lina/wren")
    assert (pulled.code, pulled.out) == (0, f"lina/wren is here as revision {commit}.\n")
    assert "downloading" in pulled.err
    assert hub_world.weights("lina/wren") == (newer / "model.safetensors").read_bytes()


@_sends_files
def test_a_private_model_needs_the_servers_key_and_stays_private(
    rookery: Rookery, hub_world: HubWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_world.store.import_folder(write_tiny_gpt2(tmp_path / "tiny"), "lina/wren")
    hub_world.store.set_visibility("lina/wren", Visibility.PRIVATE)
    assert rookery("push", "lina/wren").code == 0
    assert hub_world.hub.repos["lina/wren"].head.info == {"private": True}
    assert rookery("push", "lina/wren", "--public", "--to", "lina/shown").code == 0
    assert hub_world.hub.repos["lina/shown"].head.info == {}
    monkeypatch.delenv("ROOKERY_API_KEY")
    for word, code in (("push", 3), ("pull", 4), ("show", 3)):  # who may not see it is told that there is none
        refused = rookery(word, "lina/wren")
        assert (refused.code, refused.out) == (code, "")


def test_what_cannot_be_pushed_or_pulled_is_a_sentence_and_an_exit_code(
    rookery: Rookery, hub_world: HubWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_world.store.import_folder(write_tiny_gpt2(tmp_path / "tiny"), "lina/wren")
    hub_world.hub.fail("lina/down", Fault(503, headers={"Retry-After": "3600"}))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    for arguments, code, said in (
        (["push", "lina/nobody"], 3, "lina/nobody"),
        (["push", "lina/wren"], 4, "hf auth login"),
        (["push", "lina/wren", "--endpoint", "http://127.0.0.1:9"], 5, "http://127.0.0.1:9"),
        (["push", "lina/wren", "--to", "a/b/c"], 1, "a/b/c"),
        (["pull", "lina/nobody"], 3, "lina/nobody"),
        (["pull", "a/b/c"], 3, "no model of that name"),
        (["pull", "lina/down"], 5, "lina/down"),
    ):
        refused = rookery(*arguments)
        assert (refused.code, refused.out) == (code, ""), arguments
        last = refused.err.splitlines()[-1]
        assert last.startswith("rookery: ") and said in last
    monkeypatch.setenv("ROOKERY_URL", "http://127.0.0.1:9")
    assert [rookery(word, "lina/wren").code for word in ("push", "pull")] == [5, 5]
