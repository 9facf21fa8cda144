"""The command line against the real API over a loopback socket; what needs no server runs without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from rich.console import Console

from deployments.cli import app, using
from deployments.cli.words import complete_revisions
from deployments.client import Client
from serve.settings import Settings
from serve.store.opening import open_store
from tests.deployments.cli_world import COUNTS, Rookery, World, another_program
from tests.fakes.models import write_tiny_gpt2

# --- Models -----------------------------------------------------------------------------------------------


def test_ls_lists_the_models_or_those_with_a_word_in_their_id(rookery: Rookery, world: World) -> None:
    listed = rookery("ls")
    assert [line.split()[0] for line in listed.out.splitlines()[1:]] == [*world.catalogue.models]
    assert "huggingtweets/ada" not in rookery("ls", "bob").out
    assert [model["id"] for model in json.loads(rookery("ls", "bob", "--json").out)["data"]] == ["huggingtweets/bob"]
    assert "more than 1" in rookery("ls", "--limit", 1).err


def test_quiet_lists_are_ids_alone_for_other_programs(rookery: Rookery, world: World, archive: Path) -> None:
    assert rookery("ls", "-q").out.split() == [*world.catalogue.models]
    assert rookery("ls", "bob", "--limit", 1, "-q").out == "huggingtweets/bob\n"
    rookery("train", archive)
    assert rookery("jobs", "-q").out == rookery("jobs", "ls", "-q").out == "ftjob-0\n"


@pytest.mark.parametrize("verb", ["rm", "erase", "bench"])
def test_verbs_of_several_models_propose_them(verb: str, world: World) -> None:
    root: Any = typer.main.get_command(app)
    command = root.commands[verb]
    context = command.make_context(verb, [], resilient_parsing=True)
    proposed = command.params[0].shell_complete(context, "huggingtweets/a")
    assert [item.value for item in proposed] == ["huggingtweets/ada"]


def test_rollback_proposes_the_revisions_that_it_could_go_to(world: World) -> None:
    context: Any = SimpleNamespace(params={"model": "huggingtweets/ada", "url": os.environ["ROOKERY_URL"]})
    assert complete_revisions(context, "abc") == ["abc121"]
    assert complete_revisions(context, "x") == []


def test_ps_lists_what_is_in_memory(rookery: Rookery, world: World) -> None:
    assert "huggingtweets/ada" in rookery("ps").out
    (resident,) = json.loads(rookery("ps", "--json").out)["data"]
    assert resident == {
        "model": "huggingtweets/ada",
        "revision": "abc123",
        "tier": "device",
        "bytes": 249_000_000,
        "leases": 2,
        "idle_s": 0.5,
        "replica": "r1",
    }


def test_show_tells_the_counts_of_a_bot(rookery: Rookery, world: World) -> None:
    shown = rookery("show", "huggingtweets/ada")
    assert shown.out.splitlines()[-1].split() == ["@ada", "12", "2", "1", "9"]
    assert json.loads(rookery("show", "huggingtweets/ada", "--json").out)["counts"] == COUNTS


def test_versions_are_listed_and_rollback_goes_one_back(rookery: Rookery, world: World) -> None:
    rows = [line.split() for line in rookery("versions", "huggingtweets/ada").out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["abc123", "abc122", "abc121"]
    assert rows[0][-2:] == ["answers", "now"] and rows[1][-4:] == ["checkpoint", "of", "step", "40"]
    done = rookery("rollback", "huggingtweets/ada")
    assert (done.code, done.out) == (0, "huggingtweets/ada is now revision abc121.\n")
    assert json.loads(rookery("versions", "huggingtweets/ada", "--json").out)["data"][2]["is_main"]
    refused = rookery("rollback", "huggingtweets/ada")
    assert (refused.code, "no version before" in refused.err) == (1, True)
    again = json.loads(rookery("rollback", "huggingtweets/ada", "abc123", "--json").out)
    assert again["is_main"] and world.catalogue.main["huggingtweets/ada"] == "abc123"
    for wrong, code in (("abc122", 1), ("fffffff", 3)):
        assert rookery("rollback", "huggingtweets/ada", wrong).code == code


def test_rm_deletes_a_model_from_disk_and_memory_but_not_the_base(rookery: Rookery, world: World) -> None:
    assert rookery("rm", "huggingtweets/ada", "huggingtweets/bob").code == 0
    assert list(world.catalogue.models) == ["fledgling"]
    assert world.generator.forgotten == ["huggingtweets/ada", "huggingtweets/bob"]
    refused = rookery("rm", "fledgling")
    assert (refused.code, "cannot be deleted" in refused.err) == (1, True)


def test_rm_of_several_models_prints_one_document_also_when_one_is_refused(rookery: Rookery, world: World) -> None:
    done = rookery("rm", "huggingtweets/ada", "huggingtweets/bob", "fledgling", "--json")
    deleted = json.loads(done.out)["data"]
    assert (done.code, [model["id"] for model in deleted]) == (1, ["huggingtweets/ada", "huggingtweets/bob"])


def test_an_id_that_is_none_asks_for_nothing_else(rookery: Rookery, world: World, archive: Path) -> None:
    rookery("train", archive)
    (file_id,) = world.files.records
    asked = [
        [*command, word] for command in (["rm"], ["show"], ["versions"]) for word in (f"../files/{file_id}", "..", "")
    ]
    asked += [["jobs", "show", ".."], ["jobs", "cancel", f"../../files/{file_id}"], ["runs", "."]]
    for arguments in asked:
        done = rookery(*arguments)
        assert (done.code, done.out, done.err.count("\n")) == (3, "", 1) and "of that name" in done.err
    assert list(world.files.records) == [file_id]


def test_a_raw_card_cannot_steer_a_terminal(rookery: Rookery, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "read_card", lambda *_: "# Ada\x1b[2J\n")
    assert rookery("card", "huggingtweets/ada", "--raw").out == "# Ada\x1b[2J\n"
    monkeypatch.setattr(using, "console", Console(force_terminal=True))
    assert rookery("card", "huggingtweets/ada", "--raw").out == "# Ada[2J\n"


# --- Without a server -------------------------------------------------------------------------------------


def test_no_server_at_the_address_is_an_exit_code_of_its_own(rookery: Rookery) -> None:
    for url in ("http://127.0.0.1:9", "no address", "127.0.0.1:9"):
        done = rookery("ls", "--url", url)
        assert (done.code, done.out) == (5, ""), url
        assert url in done.err


def test_another_program_at_the_address_is_not_taken_for_a_server(rookery: Rookery) -> None:
    with another_program() as url:
        done = rookery("ls", "--url", url)
        assert (done.code, "is it another program?" in done.err) == (5, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["ls", "--frobnicate"],
        ["generate"],
        ["generate", "gpt2", "-n", "0"],
        ["generate", "gpt2", "-n", "17"],
        ["train", "no-such-file.zip"],
        ["train", __file__, "--handle", "ada", "--handle", "bob"],
        ["import", "no-such-folder", "--as", "a/b"],
    ],
)
def test_wrong_usage_exits_with_2(rookery: Rookery, arguments: list[str]) -> None:
    done = rookery(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "Usage:" in done.err


def test_a_setting_that_does_not_exist_is_named(rookery: Rookery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOKERY_PROT", "8000")
    done = rookery("up", "--no-browser")
    assert (done.code, "ROOKERY_PROT is not a setting" in done.err) == (1, True)


def test_the_command_runs_as_a_program_of_its_own() -> None:
    command = [sys.executable, "-m", "deployments.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    for name in (
        "up",
        "train",
        "generate",
        "ls",
        "ps",
        "show",
        "rm",
        "jobs",
        "preview",
        "import",
        "versions",
        "rollback",
        "runs",
    ):
        assert f" {name} " in done.stdout


def test_import_makes_a_plain_folder_servable(rookery: Rookery, tmp_path: Path) -> None:
    folder, data = write_tiny_gpt2(tmp_path / "plain"), tmp_path / "data"
    done = rookery("import", folder, "--as", "Org/Tiny", "--data", data, "--json")
    assert done.code == 0
    found = open_store(Settings(data=data)).resolve("org/tiny")
    assert json.loads(done.out) == {"id": "Org/Tiny", "revision": found.revision, "path": str(found.path)}
    assert (found.path / "model.safetensors").is_file()


def test_import_under_an_id_with_a_revision_is_refused(rookery: Rookery, tmp_path: Path) -> None:
    done = rookery("import", write_tiny_gpt2(tmp_path / "plain"), "--as", "org/tiny@v1", "--data", tmp_path / "data")
    assert (done.code, "leave out '@v1'" in done.err) == (1, True)


def test_import_of_a_folder_without_a_model_is_refused(rookery: Rookery, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = rookery("import", tmp_path / "empty", "--as", "org/tiny", "--data", tmp_path / "data")
    assert (done.code, "no weights" in done.err) == (1, True)
