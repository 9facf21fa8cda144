"""A live service that maps weight files all the time while they are replaced: models that do not fit, trained anew.

No file under a map may ever shrink or change: the process would end by SIGBUS.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import httpx

from serve.store.revisions import Store
from tests.deployments.conftest import BASE, import_tiny_model, start_service, stop_service
from tests.fakes.models import write_tiny_gpt2
from tests.faults.traffic import Traffic, make_asks

NUM_MODELS, NUM_VERSIONS = 12, 8
WIDTH = 192  # 4 MB each
ROOM_BYTES = 30_000_000  # for about half of them
_PAUSE_S = 0.25


def run(minutes: float, folder: Path) -> dict[str, Any]:
    """Each model gets another version in turn, and the one before is removed at once."""
    data = folder / "data"
    import_tiny_model(data, BASE)
    store = Store(data, embedded={})
    sources = [write_tiny_gpt2(folder / f"v{seed}", seed=seed, n_embd=WIDTH) for seed in range(NUM_VERSIONS)]
    names = [f"soak/m{number}" for number in range(NUM_MODELS)]
    for number, name in enumerate(names):
        store.import_folder(sources[number % NUM_VERSIONS], name)
    live = start_service(data, "--generators", "2", ROOKERY_MEMORY_BYTES=str(ROOM_BYTES))
    published = 0
    try:
        before = sorted(live.replica_pids("generator"))
        with Traffic(live.url, make_asks(names, 100, num_tokens=(2, 8)), unary=4, streams=4, pause_s=0.02) as traffic:
            until = time.monotonic() + 60 * minutes
            for number in itertools.count():
                if time.monotonic() > until:
                    break
                name = names[number % NUM_MODELS]
                old = store.main_of(name)
                new = store.import_folder(sources[(number // NUM_MODELS + number + 1) % NUM_VERSIONS], name)
                if old not in (None, new.revision):
                    store.drop_revision(name, str(old))
                published += 1
                time.sleep(_PAUSE_S)
        after = sorted(live.replica_pids("generator"))
        loads = _loads(live.url)
    finally:
        stop_service(live)
    verdict = traffic.verdict()
    return {
        "minutes": minutes,
        "published": published,
        "loads": loads,
        "died": len(set(before) - set(after)),
        "requests": verdict.requests,
        "failed": verdict.requests - verdict.whole,
        "errors": dict(verdict.errors),
    }


def _loads(url: str) -> int:
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    named = [line for line in lines if line.startswith("rookery_model_loads_total{") and 'outcome="ok"' in line]
    return round(sum(float(line.rpartition(" ")[2]) for line in named))
