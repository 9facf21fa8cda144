"""The Hugging Face Hub: what it lacks or forbids, its outages, its lies, and many who want one model."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from serve.store.revisions import Store
from serve.store.validate import WEIGHTS
from tests.fakes.hub import Fault, fake_hub
from tests.fakes.models import write_tiny_gpt2
from tests.faults.row import Measured, row
from tests.hub import test_faults as matrix
from tests.hub.outage import outage
from tests.hub.processes import fetching
from tests.hub.test_claims import ADA, SLOW, gets, nothing_is_under_way

_NUM_PROCESSES = 8


def _measured(rows: Sequence[matrix.Row], folder: Path, share: float) -> Measured:
    """Each trouble of the Hub, with what a caller must get. A share leaves out the last ones."""
    wrong = []
    chosen = rows[: max(2, round(len(rows) * share))]
    for number, one in enumerate(chosen):
        work = folder / str(number)
        work.mkdir()
        with fake_hub() as server:
            try:
                asyncio.run(
                    matrix.test_trouble_has_its_answer_in_time_and_what_is_here_does_not_notice(server, work, one)
                )
            except AssertionError as exc:
                wrong.append(f"{one.name}: {exc}"[:300])
    return Measured(f"{len(chosen) - len(wrong)} of {len(chosen)} so", not wrong, {"wrong": wrong})


@row(
    "F12",
    did=f"the Hub says 404, 401, 403 or 451, in {len(matrix.F12)} ways, while a model that is here writes texts",
    expected="404, 403 or 422 at once; asked again, the Hub hears nothing; nothing is evicted",
    minutes=1,
)
def refused(folder: Path, share: float) -> Measured:
    return _measured(matrix.F12, folder, share)


@row(
    "F13",
    did="10 minutes of a Hub that refuses connections, says 503, trickles, resets, sends pages, is silent",
    expected="models that are here: 0 errors, and the Hub is not asked for them; others: 503 with Retry-After",
    minutes=13,
)
def away(folder: Path, share: float) -> Measured:
    figures = outage(10 * share, folder)
    holds = (
        figures["outage_errors"] == figures["outage_hub_requests_cached"] == 0
        and figures["outage_absent_without_retry_after"] == 0
        and figures["outage_recovery_s"] is not None
    )
    return Measured(
        f"{figures['outage_errors']} errors in {figures['outage_requests']:,} texts; others by status: "
        f"{', '.join(f'{count} x {status}' for status, count in figures['outage_absent_statuses'].items())}; models "
        f"come again after {figures['outage_recovery_s']} s",
        holds,
        figures,
    )


@row(
    "F13b",
    did=f"429, 5xx and resets, in {len(matrix.F13)} ways, one after another",
    expected="at most 4 tries, Retry-After is heeded and handed on; what passes is waited for",
    minutes=2,
)
def in_trouble(folder: Path, share: float) -> Measured:
    return _measured(matrix.F13, folder, share)


@row(
    "F14",
    did="slow, trickling, silent, HTML, short, long, other bytes, another commit's, kept elsewhere: "
    f"{len(matrix.F14)} ways; the deadline is 5 s",
    expected="ends by the deadline + 1 s, no bad file is published, what is here goes on",
    minutes=4,
)
def lying(folder: Path, share: float) -> Measured:
    return _measured(matrix.F14, folder, share)


@row(
    "F15",
    did=f"{_NUM_PROCESSES} processes of a node want one model at once, 20 times; then 20 times with locks switched off",
    expected="each file is asked for once; without locks all have the right bytes all the same",
    minutes=3,
)
def wanted_by_many(folder: Path, share: float) -> Measured:
    repo = write_tiny_gpt2(folder / "repo")
    rounds = max(1, round(20 * share))
    count: Counter[str] = Counter()
    for number in range(2 * rounds):
        is_locking, work = number < rounds, folder / str(number)
        with fake_hub() as server:
            sha = server.add(ADA, repo)
            server.fail(ADA, Fault(path=WEIGHTS, pace=SLOW))  # so that none comes too late to compete
            data = work / "data"
            with fetching(_NUM_PROCESSES, data, server.endpoint, ADA, is_locking=is_locking) as (_, found):
                results = [found.get(timeout=120) for _ in range(_NUM_PROCESSES)]
            weights = Store(data, embedded={}).resolve(ADA).path / WEIGHTS
            count["wrong"] += sum(one != sha for one in results)
            count["wrong"] += weights.read_bytes() != (repo / WEIGHTS).read_bytes()
            count["left"] += not nothing_is_under_way(work)
            count["twice" if is_locking else "competed"] += max(gets(server).values()) > 1
    return Measured(
        f"{count['twice']} of {rounds} fetched anything twice; without locks {count['competed']} of {rounds} did; "
        f"{count['wrong']} of {2 * rounds * _NUM_PROCESSES} answers wrong, {count['left']} left something behind",
        not count["twice"] and not count["wrong"] and not count["left"] and count["competed"] > 0,
        dict(count),
    )
