"""The person at the terminal: whether there is one, what they are asked, and where their own small files lie.

And the three streams to them, which may be closed, full, or of another encoding.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import typer

_INTERRUPTED = 130


def is_tty(stream: TextIO | None) -> bool:
    """None is what Python has for a stream that was closed when it started."""
    return stream is not None and not stream.closed and stream.isatty()


def is_attended() -> bool:
    """Whether somebody can read a question on stderr and answer it on stdin."""
    return is_tty(sys.stdin) and is_tty(sys.stderr)


def prepare_streams() -> None:
    """Closed ones become /dev/null, or what is opened next would get their numbers; no letter is an error."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def give_up_stdout() -> None:
    """After an error of it: what it still holds would be the same error again when Python ends."""
    with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def confirm(question: str) -> bool:
    """Whether they say yes; neither Enter nor Ctrl-D is one. Raises: typer.Exit after Ctrl-C."""
    try:
        return typer.confirm(question, default=False, err=True)
    except typer.Abort as exc:
        typer.echo(err=True)
        if isinstance(exc.__context__, KeyboardInterrupt):
            raise typer.Exit(_INTERRUPTED) from exc
        return False


def state_folder() -> Path:
    """Made where it is missing. Source: the XDG base directory specification."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "rookery"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
