"""The outbox: which trackers are still to be told of which job.

It is written with the job's success, in the same transaction. A tracker that hangs, fails or is not there costs a
training this row and nothing else. Knows no tracker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from sqlalchemy import ColumnElement, and_, select, update
from sqlalchemy.orm import Session

from serve.database.connection import read_clock_ms
from serve.database.tables import DeliveryRow
from serve.types import Integration

MAX_TRIES = 24
FIRST_DELAY_S = 30.0
MAX_DELAY_S = 3_600.0  # so that a tracker may be away for about 18 hours

WAITING, DONE, FAILED = "waiting", "done", "failed"


@dataclass(frozen=True, slots=True)
class Delivery:
    """A try, the `tries`th, to tell one tracker of one job."""

    job_id: str
    integration: Integration
    tries: int


def deliveries_of(integrations: Sequence[Integration], trackers: str) -> dict[str, dict[str, Any]]:
    """Tracker -> options, as `JobQueue.finish` writes them: what a job asked for, and those told of every job.

    `trackers`: their names with commas between, as in ROOKERY_TRACKERS.
    """
    of_all = [Integration(cast(Any, name.strip())) for name in trackers.split(",") if name.strip()]
    return {one.tracker: asdict(one) for one in [*of_all, *integrations]}


def has_due(session: Session) -> bool:
    return (
        session.scalars(select(DeliveryRow.job_id).where(_is_due(read_clock_ms(session))).limit(1)).first() is not None
    )


def claim_delivery(session: Session, hold_s: float) -> Delivery | None:
    """The next that is due. Nobody else gets it for `hold_s` and the delay after that, whatever becomes of the caller.

    One whose last try was never heard of again ends here as failed.
    """
    now = read_clock_ms(session)
    query = select(DeliveryRow).where(_is_due(now)).order_by(DeliveryRow.not_before_ms).limit(1)
    while (row := session.scalars(query.with_for_update(skip_locked=True)).first()) is not None:
        if row.tries < MAX_TRIES:
            row.tries += 1
            row.not_before_ms = now + int((hold_s + _delay_s(row.tries)) * 1000)
            return Delivery(row.job_id, _to_integration(row), row.tries)
        row.status, row.outcome = FAILED, "The process that told it died each time."
        session.flush()
    return None


def settle_delivery(session: Session, delivery: Delivery, *, done: bool, outcome: str) -> None:
    """`outcome`: where it can be seen, or why it failed; then it is tried again later, `MAX_TRIES` times in all."""
    row = session.get(DeliveryRow, (delivery.job_id, delivery.integration.tracker), with_for_update=True)
    if row is None or row.tries != delivery.tries or row.status != WAITING:
        return  # somebody else has taken it since
    row.outcome = outcome
    if done or row.tries >= MAX_TRIES:
        row.status = DONE if done else FAILED
    else:
        row.not_before_ms = read_clock_ms(session) + int(_delay_s(row.tries) * 1000)


def return_delivery(session: Session, delivery: Delivery) -> None:
    """It was interrupted without anybody's fault: as if it had not been tried."""
    row = session.get(DeliveryRow, (delivery.job_id, delivery.integration.tracker), with_for_update=True)
    if row is not None and row.tries == delivery.tries and row.status == WAITING:
        row.tries -= 1
        row.not_before_ms = 0


def reopen_failed(session: Session) -> None:
    """Gives everything that failed all its tries anew: the key was wrong, and has been set right."""
    values = {"status": WAITING, "tries": 0, "not_before_ms": 0}
    session.execute(update(DeliveryRow).where(DeliveryRow.status == FAILED).values(values))


def _is_due(now: int) -> ColumnElement[bool]:
    return and_(DeliveryRow.status == WAITING, DeliveryRow.not_before_ms <= now)


def _delay_s(tries: int) -> float:
    return min(FIRST_DELAY_S * 2.0 ** (tries - 1), MAX_DELAY_S)


def _to_integration(row: DeliveryRow) -> Integration:
    options = {**row.options, "tracker": row.tracker, "tags": tuple(row.options.get("tags", ()))}
    return Integration(**options)
