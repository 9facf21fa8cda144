"""What documents name is there: files, make targets, settings, modules, plans, verbs and options of the commands."""

from __future__ import annotations

import re
import shlex
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml  # type: ignore[import-untyped]

from deployments.cli.app import app
from loadtest import __main__ as loadtest
from loadtest.traffic.reading import plan_of
from serve.settings import PREFIX, Settings
from tests.docs.documents import ROOT, Block, blocks, documents

_COMMAND = typer.main.get_command(app)
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
_VARIABLE = re.compile(rf"`?{PREFIX}[A-Z_]+")
_MODULE = re.compile(r"python -m ([\w.]+)")
_ASSIGNMENTS = re.compile(r"^(?:[A-Z_]+=\S+ )+")


def _of(*languages: str) -> list[Block]:
    return [block for block in blocks() if block.language in languages]


_SHELL = _of("sh")
_SHOWN = _of("sh", "console")


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_document_links_to_is_there(path: Path) -> None:
    missing = [link for link in _LINK.findall(path.read_text()) if not (path.parent / link.split()[0]).exists()]
    assert not missing


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_setting_that_a_document_names_is_one(path: Path) -> None:
    known = Settings().to_env().keys()
    named = {name.strip("`") for name in _VARIABLE.findall(path.read_text())} - {PREFIX}
    assert named <= known


@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_that_a_document_runs_is_there(path: Path) -> None:
    assert not [name for name in _MODULE.findall(path.read_text()) if find_spec(name) is None]


@pytest.mark.parametrize("block", _SHOWN, ids=str)
def test_every_verb_and_option_of_the_commands_is_one(block: Block) -> None:
    for command in block.commands:
        for part in re.split(r"\s[|>]\s|\s&$", command):
            part = _ASSIGNMENTS.sub("", part)
            if part.startswith("rookery "):
                _parse(_COMMAND, shlex.split(part)[1:])
            elif part.startswith("python -m loadtest "):
                words = shlex.split(part)[3:]
                _parse(_loadtest(words[0]), words[1:] if words[0] in loadtest._ELSEWHERE else words)


def _loadtest(verb: str) -> Any:
    """Its command line; what is wired only when it is asked for, by itself."""
    if verb not in loadtest._ELSEWHERE:
        return typer.main.get_command(loadtest.app)
    module, function, _ = loadtest._ELSEWHERE[verb]
    alone = typer.Typer()
    alone.command()(getattr(import_module(module), function))
    return typer.main.get_command(alone)


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
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in block.commands:
        if command.startswith("make "):
            assert command.split()[1] in targets


@pytest.mark.parametrize("block", _of("python"), ids=str)
def test_every_piece_of_python_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize("block", _of("toml"), ids=str)
def test_every_piece_of_toml_is_a_plan(block: Block) -> None:
    plan_of(tomllib.loads(block.text), source=str(block))


@pytest.mark.parametrize("block", _of("yaml"), ids=str)
def test_every_piece_of_yaml_can_be_read(block: Block) -> None:
    assert isinstance(yaml.safe_load(block.text), dict)


def test_every_block_of_code_has_a_known_kind() -> None:
    assert {block.language for block in blocks()} <= {"sh", "python", "console", "toml", "yaml"}
