"""Measures one row in this process, which is its own: no row sees what another has imported, cached or leaked.

python -m tests.faults.measure F1 FOLDER SHARE    # the figures go to FOLDER/measured.json
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from pathlib import Path


def main(row_id: str, folder: Path, share: float) -> None:
    # Here, since processes that a row starts by multiprocessing read this file again, and rows take torch with them.
    from tests.faults.row import ROWS
    from tests.faults.table import load_rows

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through all that cleans up
    load_rows()
    work = folder / "work"
    work.mkdir()
    measured = ROWS[row_id].measure(work, share)
    (folder / "measured.json").write_text(json.dumps(dataclasses.asdict(measured)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
