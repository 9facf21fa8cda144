"""The table of faults, row by row: `make faults`.

    python -m tests.faults [--rows F1,B3] [--share 0.1] [--save]

Each row does its fault to the running system, in a process of its own, and says what came of it. Status 0 if all hold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.faults.row import Row
from tests.faults.table import Result, line, load_rows, missing, picked, save_result, write_readme

_PATIENCE = 3  # times what a row takes on a quiet machine; a row that hangs does not hold
_START_S = 300.0


def measure(row: Row, share: float) -> Result:
    """Runs the row. One that raises or hangs does not hold, and its figure is its last words."""
    with tempfile.TemporaryDirectory(prefix=f"rookery-{row.id}-", ignore_cleanup_errors=True) as folder:
        started = time.monotonic()
        command = [sys.executable, "-m", "tests.faults.measure", row.id, folder, str(share)]
        errors = Path(folder) / "errors"
        with errors.open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            process.wait(_START_S + _PATIENCE * 60 * row.minutes * share)
            figures = _figures(Path(folder) / "measured.json", errors)
        except subprocess.TimeoutExpired:
            figures = {"figure": f"error: hung for {time.monotonic() - started:.0f} s", "holds": False}
        finally:
            _end(process)
        return Result(
            **figures,
            share=share,
            seconds=round(time.monotonic() - started, 1),
            date=datetime.now(UTC).date().isoformat(),
            cores=os.cpu_count() or 1,
            cpu=_cpu(),
        )


def _figures(measured: Path, errors: Path) -> dict[str, Any]:
    if measured.exists():
        figures: dict[str, Any] = json.loads(measured.read_text(encoding="utf-8"))
        return figures
    said = errors.read_text(encoding="utf-8", errors="replace")
    print(said, file=sys.stderr, flush=True)
    return {"figure": f"error: {(said.strip().splitlines() or ['it ended without a word'])[-1][:200]}", "holds": False}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Lets it end all that it has started."""
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _cpu() -> str:
    """Its name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="ids with commas between them; all of them without")
    parser.add_argument("--share", type=float, default=1.0, help="of the full number of cases")
    parser.add_argument("--save", action="store_true", help="into measured.json, and the table of the README")
    parser.add_argument("--write-readme", action="store_true", help="from measured.json; measures nothing")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through all that cleans up
    rows = load_rows()
    if arguments.write_readme:
        write_readme(rows)
        return
    try:
        chosen = picked(rows, [row_id for row_id in arguments.rows.split(",") if row_id])
    except ValueError as exc:
        parser.error(str(exc))
    print("| | What was done | Expected | Measured | Holds | Took |\n|---|---|---|---|---|---|", flush=True)
    outcomes = Counter[str]()
    for row in chosen:
        if reason := missing(row.needs):
            outcomes["skipped"] += 1
            print(line(row, f"skipped: {reason}", "", seconds=0), flush=True)
            continue
        result = measure(row, arguments.share)
        outcomes["held" if result.holds else "failed"] += 1
        print(line(row, result.figure, "yes" if result.holds else "NO", seconds=result.seconds), flush=True)
        if arguments.save:
            save_result(row.id, result)
            write_readme(rows)
    print(json.dumps({"rows": len(chosen), **{name: outcomes[name] for name in ("held", "failed", "skipped")}}))
    sys.exit(bool(outcomes["failed"]))


if __name__ == "__main__":
    main()
