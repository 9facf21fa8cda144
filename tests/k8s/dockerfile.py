"""A Dockerfile as stages of instructions, for questions to it. Knows the syntax that ours has, nothing of building."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_INSTRUCTION = re.compile(r"([A-Z]+)\s+(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Instruction:
    """Its name, and the rest in one line."""

    name: str
    text: str

    def words(self) -> list[str]:
        """The rest as a list: JSON's where it is one, else a shell's."""
        if self.text.startswith("["):
            found: list[str] = json.loads(self.text)
            return found
        return shlex.split(self.text)


@dataclass(frozen=True, slots=True)
class Stage:
    """What is built from `base`: an image's name or another stage's."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        return [one for one in self.instructions if one.name == name]

    def one(self, name: str) -> Instruction:
        (found,) = self.all(name)
        return found

    def pairs(self, name: str) -> dict[str, str]:
        """NAME=VALUE of all instructions of this name."""
        words = [word for one in self.all(name) for word in one.words()]
        return dict(word.split("=", 1) for word in words if "=" in word)

    def packages(self) -> list[str]:
        """What apt-get installs."""
        commands = [shlex.split(part) for one in self.all("RUN") for part in one.text.split("&&")]
        installs = [words for words in commands if words[:2] == ["apt-get", "install"]]
        return [word for words in installs for word in words[2:] if not word.startswith("-")]


@dataclass(frozen=True, slots=True)
class Dockerfile:
    """Arguments that stand before all stages, and the stages by name, in order."""

    arguments: dict[str, str]
    stages: dict[str, Stage]


def read_dockerfile(path: Path) -> Dockerfile:
    """Raises: ValueError at a line that is no instruction."""
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for one in _instructions(path.read_text()):
        if one.name == "FROM":
            base, _, name = one.text.partition(" AS ")
            stages.append(Stage(name, base))
        elif stages:
            stages[-1].instructions.append(one)
        else:
            name, _, default = one.text.partition("=")
            arguments[name] = default
    return Dockerfile(arguments, {one.name: one for one in stages})


def _instructions(text: str) -> Iterator[Instruction]:
    lines = (line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        found = _INSTRUCTION.fullmatch(line.strip())
        if found is None:
            raise ValueError(f"this is no instruction: {line!r}")
        yield Instruction(found[1], re.sub(r"\s+", " ", found[2]))
