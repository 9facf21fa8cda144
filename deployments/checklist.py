"""A list of things that are looked at or done, a line each, with a mark in front. Knows none of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.text import Text

from deployments.show import plain

Mark = Literal["ok", "note", "problem"]

_SYMBOLS: dict[Mark, str] = {"ok": "✓", "note": "•", "problem": "✗"}
_STYLES: dict[Mark, str] = {"ok": "green", "note": "yellow", "problem": "bold red"}
_WORD_WIDTH = len("problem")
_NAME_WIDTH = 14
_SLOW_S = 1.0  # from here on it is said how long a step took


class Checklist:
    """Prints to `console`: symbols in a terminal that knows them, else words."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._is_live = console.is_terminal and not console.is_dumb_terminal
        self._has_symbols = self._is_live and console.encoding.lower().startswith("utf")

    def line(self, mark: Mark, name: str, detail: str = "") -> None:
        """One line. `detail` may hold more lines, which are set below its first."""
        word = _SYMBOLS[mark] if self._has_symbols else f"{mark:<{_WORD_WIDTH}}"
        indent = "\n" + " " * (len(word) + _NAME_WIDTH + 2)
        text = Text.assemble((word, _STYLES[mark]), f" {plain(name):<{_NAME_WIDTH}} {plain(detail)}".rstrip())
        text.plain = text.plain.replace("\n", indent)
        self._console.print(text, soft_wrap=True)

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[[str], None]]:
        """Does the block; its line comes at the end, with what the block has said by the function that it gets."""
        said: list[str] = []
        began = time.monotonic()
        if self._is_live:
            self._console.print(Text(f"{'…' if self._has_symbols else '.'} {name}", "dim"), end="\r")
        try:
            yield said.append
        except Exception:
            self.line("problem", name)
            raise
        took_s = time.monotonic() - began
        if took_s >= _SLOW_S:
            said.append(f"({took_s:.0f} s)")
        self.line("ok", name, " ".join(said))

    def relay(self, line: str) -> None:
        """Prints a line of a checklist that another process wrote as words; any other is left out."""
        word, rest = line[:_WORD_WIDTH].strip(), line[_WORD_WIDTH:].strip()
        name, detail = rest[:_NAME_WIDTH].strip(), rest[_NAME_WIDTH:].strip()
        if word in _SYMBOLS and line[_WORD_WIDTH : _WORD_WIDTH + 1] == " ":
            self.line(word, name, detail)
