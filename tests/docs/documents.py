"""The project's documents, and the code in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_NOT_OURS = {".venv", ".git", "node_modules", ".pytest_cache", ".rookery", "build", "dist"}
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """Code that a document shows. `sh` and `python` run as they stand; `console` shows what is typed elsewhere."""

    path: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Of a shell's block: one each, without comments, continued lines joined."""
        lines = re.sub(r"\\\n\s*", " ", self.text).splitlines()
        return [command for line in lines if (command := re.sub(r"(^|\s{2,})#.*$", "", line).strip())]


def documents() -> list[Path]:
    """The front one first."""
    found = [path for path in ROOT.rglob("*.md") if not _NOT_OURS & set(path.relative_to(ROOT).parts)]
    return sorted(found, key=lambda path: (len(path.relative_to(ROOT).parts), path))


def blocks() -> Iterator[Block]:
    for path in documents():
        text = path.read_text(encoding="utf-8")
        for match in _BLOCK.finditer(text):
            yield Block(path, text.count("\n", 0, match.start()) + 1, match[1], match[2])
