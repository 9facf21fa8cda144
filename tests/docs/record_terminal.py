"""Records the command at work in a real terminal, as the picture that its document shows.

    python -m tests.docs.record_terminal            # writes deployments/terminal.svg; needs pyte

Everything on it was printed by the command to a pseudo-terminal, on a service that it starts in an empty folder.
"""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path

import pyte

from deployments.haproxy import free_port
from tests.docs.documents import ROOT

WIDTH, HEIGHT = 100, 400
_CELL, _LINE, _PAD = 8.43, 19, 18
_COMMANDS = (
    "rookery up --detach --port {port} --no-browser",
    "rookery preview archive.zip",
    "rookery train archive.zip --handle capt_barnacle --yes --wait",
    'rookery generate huggingtweets/capt_barnacle "My dream is" -n 3 --seed 7 --temperature 0.8',
    'echo "My dream is" | rookery generate huggingtweets/capt_barnacle --jsonl --seed 7 | cut -c1-98',
    "rookery ls",
    "rookery ps",
    "rookery show nobody/here; echo exit code $?",
    "rookery down",
)
_COLOURS = {"default": "#e9ede9", "green": "#86cdb6", "cyan": "#7fc8e0", "red": "#f5a198", "brown": "#f0c36d"}


def main() -> None:
    """Runs the commands one after the other and draws what the terminal shows at the end."""
    screen = pyte.Screen(WIDTH, HEIGHT)
    stream = pyte.ByteStream(screen)
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(ROOT / "deployments" / "archives" / "capt_barnacle.zip", Path(folder) / "archive.zip")
        for command in _COMMANDS:
            shown = command.format(port=8000)
            stream.feed(f"\x1b[1;32m$\x1b[0m \x1b[1m{shown}\x1b[0m\r\n".encode())
            printed = _run(command.format(port=port), Path(folder), port)
            stream.feed(printed.replace(f"{folder}/".encode(), b"").replace(f":{port}".encode(), b":8000") + b"\r\n")
    (ROOT / "deployments" / "terminal.svg").write_text(_draw(screen), encoding="utf-8")


def _run(command: str, folder: Path, port: int) -> bytes:
    """What it prints to a terminal."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {
        **os.environ,
        "PATH": path,
        "TERM": "xterm-256color",
        "COLUMNS": str(WIDTH),
        "LINES": "50",
        "ROOKERY_URL": f"http://127.0.0.1:{port}",
        "ROOKERY_DATA": str(folder / ".rookery"),
        "XDG_STATE_HOME": str(folder),
    }
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["bash", "-c", command], cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True
    )
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError):  # the last one who could write has gone
        while data := os.read(ours, 65_536):
            printed += data
    process.wait()
    os.close(ours)
    return printed


def _draw(screen: pyte.Screen) -> str:
    last = max((y for y, line in screen.buffer.items() if any(c.data.strip() for c in line.values())), default=0)
    height = (last + 1) * _LINE + 2 * _PAD
    width = round(WIDTH * _CELL) + 2 * _PAD
    lines = [_draw_line(screen, y) for y in range(last + 1)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="14" '
        'font-family="ui-monospace, DejaVu Sans Mono, monospace">'
        f'<rect width="{width}" height="{height}" rx="10" fill="#121615"/>\n' + "\n".join(lines) + "\n</svg>\n"
    )


def _draw_line(screen: pyte.Screen, y: int) -> str:
    """Runs of cells that look alike, each at its own column, so that no font moves the others."""
    runs: list[tuple[int, str, str, bool]] = []
    for x in range(WIDTH):
        cell = screen.buffer[y][x]
        colour = _COLOURS.get(cell.fg, f"#{cell.fg}" if len(cell.fg) == 6 else _COLOURS["default"])
        if runs and runs[-1][2:] == (colour, cell.bold) and x == runs[-1][0] + len(runs[-1][1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + cell.data, colour, cell.bold)
        else:
            runs.append((x, cell.data, colour, cell.bold))
    top = _PAD + (y + 0.75) * _LINE
    return "".join(
        f'<text x="{_PAD + x * _CELL:.1f}" y="{top:.1f}" fill="{colour}" xml:space="preserve"'
        + (' font-weight="bold"' if bold else "")
        + f' textLength="{len(text.rstrip()) * _CELL:.1f}">{escape(text.rstrip())}</text>'
        for x, text, colour, bold in runs
        if text.strip()
    )


if __name__ == "__main__":
    main()
