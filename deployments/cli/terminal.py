"""The person at the terminal: whether there is one, what they are asked, and where their own small files lie."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer


def is_attended() -> bool:
    """Whether somebody can read a question on stderr and answer it on stdin."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def confirm(question: str) -> bool:
    """Whether they say yes; neither Enter, Ctrl-C nor Ctrl-D is one."""
    try:
        return typer.confirm(question, default=False, err=True)
    except typer.Abort:
        typer.echo(err=True)
        return False


def state_folder() -> Path:
    """Made where it is missing. Source: the XDG base directory specification."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "rookery"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
