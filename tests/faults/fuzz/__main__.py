"""Bad requests at a live service: `make fuzz CASES=100000 SEED=1`.

    python -m tests.faults.fuzz --cases 100000 --seed 1 [--proxy ray] [--families B1,B14] [--kept FOLDER] [--url URL]

Starts `rookery up` over a tiny model, behind HAProxy or, with `--proxy ray`, behind Ray Serve's own proxy. Ends with
one JSON line: `cases`, `status_5xx`, `hangs`, `echoes`, `slow` and more. Each case follows from the seed and its
number; some of those that went wrong are kept as files, which are the bytes that were sent. Status 0 if none did.

`slow`: a refusal that took 0.1 s longer than GET /healthz did at the time (its 99th percentile over some seconds), so
that a loaded machine is no fault of the service. `hangs`: no answer within 10 s; of requests that come byte by byte,
which are a thousandth of the cases, within 40 s. `echoes`: see `tests.faults.fuzz.verdict`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.deployments.conftest import LiveService, import_tiny_model, start_service, stop_service
from tests.faults.fuzz.run import FAMILIES, fuzz
from tests.faults.fuzz.surface import MODEL

FAULTS = ("status_5xx", "hangs", "echoes", "slow", "large", "misshapen", "garbage", "cut", "crossed", "died")


@contextmanager
def service_to_fuzz(folder: Path, proxy: str = "haproxy") -> Iterator[LiveService]:
    """With one tiny model; `proxy`: haproxy or ray."""
    data = folder / "data"
    import_tiny_model(data, MODEL)
    switch = {"RAY_SERVE_ENABLE_HA_PROXY": "0"} if proxy == "ray" else {}
    service = start_service(data, **switch)
    try:
        yield service
    finally:
        stop_service(service)


def fuzz_live(service: LiveService, num_cases: int, seed: int, kept: Path, **options: Any) -> dict[str, Any]:
    """The figures of a run; `died`: replicas that are not those of its beginning."""
    before = {pid for name in ("gateway", "generator") for pid in service.replica_pids(name)}
    assert len(before) >= 2
    figures = asyncio.run(fuzz(service.url, num_cases, seed, kept, **options))
    died = len(before - {pid for name in ("gateway", "generator") for pid in service.replica_pids(name)})
    return {**figures, "died": died}


def is_clean(figures: dict[str, Any]) -> bool:
    return not any(figures[name] for name in FAULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--proxy", choices=("haproxy", "ray"), default="haproxy")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--kept", type=Path, default=Path(tempfile.gettempdir()) / "rookery-fuzz")
    parser.add_argument("--url", help="of a service that runs, with the model tiny/base, to be used instead")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through all that cleans up
    arguments.kept.mkdir(parents=True, exist_ok=True)
    run = {
        "num_cases": arguments.cases,
        "seed": arguments.seed,
        "families": tuple(arguments.families.split(",")),
        "say": lambda line: print(line, file=sys.stderr, flush=True),
    }
    if arguments.url:
        figures = {**asyncio.run(fuzz(arguments.url, folder=arguments.kept, **run)), "died": 0}
    else:
        with (
            tempfile.TemporaryDirectory(prefix="rookery-fuzz-") as folder,
            service_to_fuzz(Path(folder), arguments.proxy) as service,
        ):
            figures = fuzz_live(service, kept=arguments.kept, **run)
    print(json.dumps(figures))
    sys.exit(not is_clean(figures))


if __name__ == "__main__":
    main()
