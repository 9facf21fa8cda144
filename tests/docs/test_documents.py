"""What the documents name is there: files, make targets, settings, verbs and options of the command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from deployments.cli.app import app
from serve.settings import PREFIX, Settings
from tests.docs.documents import ROOT, Block, blocks, documents

_COMMAND = typer.main.get_command(app)
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
_VARIABLE = re.compile(rf"`?{PREFIX}[A-Z_]+")
_SHELL = [block for block in blocks() if block.language == "sh"]
_PYTHON = [block for block in blocks() if block.language == "python"]


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_document_links_to_is_there(path: Path) -> None:
    missing = [link for link in _LINK.findall(path.read_text()) if not (path.parent / link.split()[0]).exists()]
    assert not missing


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_setting_that_a_document_names_is_one(path: Path) -> None:
    known = Settings().to_env().keys()
    named = {name.strip("`") for name in _VARIABLE.findall(path.read_text())} - {PREFIX}
    assert named <= known


@pytest.mark.parametrize("block", _SHELL, ids=str)
def test_every_verb_and_option_of_the_command_is_one(block: Block) -> None:
    for command in block.commands:
        for part in re.split(r"\s[|>]\s", command):
            words = shlex.split(part)
            if words and words[0] == "rookery":
                _parse(_COMMAND, words[1:])


def _parse(command: Any, words: list[str]) -> None:
    """Raises: UsageError, but not for a file that is not here."""
    try:
        context = command.make_context("rookery", words)
    except typer.BadParameter as exc:
        assert "does not exist" in exc.message, exc.message
        return
    if hasattr(command, "resolve_command"):  # a group
        _, verb, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        _parse(verb, rest)


@pytest.mark.parametrize("block", _SHELL, ids=str)
def test_every_make_target_is_one(block: Block) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in block.commands:
        if command.startswith("make "):
            assert command.split()[1] in targets


@pytest.mark.parametrize("block", _PYTHON, ids=str)
def test_every_piece_of_python_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


def test_every_block_of_code_has_a_known_kind() -> None:
    assert {block.language for block in blocks()} <= {"sh", "python", "console"}
