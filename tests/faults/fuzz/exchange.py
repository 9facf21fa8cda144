"""Sends one case over a connection of its own and takes what comes back, within bounds on time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass

from tests.faults.fuzz.answers import Answer, NoAnswer, read_answers
from tests.faults.fuzz.case import Case

LEAVES_AFTER_S = 0.1  # who does not wait for an answer
LINGERS_S = 0.03  # after an answer, for another one that nobody asked for
_LOOK_S = 0.05  # whether all is sent, or time is up
_SENDING_S = 60.0  # if it takes longer the other side takes no more
_READ_BYTES = 64 << 10
_MAX_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a case. `took_s`: from its last byte to the last byte of the first answer."""

    answers: tuple[Answer, ...]
    took_s: float
    hangs: bool = False
    is_garbage: bool = False  # bytes came that are no answer


async def exchange(host: str, port: int, case: Case) -> Outcome:
    """Raises: OSError where nobody listens."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.transport.set_write_buffer_limits(high=0)  # so that `drain` waits until all has left
    begun_at = time.perf_counter()
    sending = asyncio.create_task(_send(writer, case))
    raw, answered_at, quiet_since, is_closed = b"", 0.0, 0.0, False
    try:
        while len(raw) < _MAX_BYTES:
            left_s = _ends_at(case, sending, begun_at, quiet_since) - time.perf_counter()
            if left_s <= 0:
                break
            try:
                async with asyncio.timeout(min(left_s, _LOOK_S)):
                    piece = await reader.read(_READ_BYTES)
            except TimeoutError:
                continue
            except OSError:
                piece = b""
            raw += piece
            is_closed = not piece
            answers = read_answers(raw, is_head=case.is_head, is_closed=is_closed)
            quiet_since = time.perf_counter() if answers and answers[-1].is_whole else 0.0
            answered_at = answered_at or (time.perf_counter() if answers and answers[0].is_whole else 0.0)
            if is_closed:
                break
        answers = read_answers(raw, is_head=case.is_head, is_closed=is_closed)
    except NoAnswer:
        return Outcome((), 0.0, is_garbage=True)
    finally:
        last_byte_at = await _end(sending, begun_at)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    hangs = not (is_closed or answered_at or case.is_abandoned)
    return Outcome(tuple(answers), max(0.0, answered_at - last_byte_at) if answered_at else 0.0, hangs)


def _ends_at(case: Case, sending: asyncio.Task[float], begun_at: float, quiet_since: float) -> float:
    """When nothing more is waited for. `quiet_since`: when an answer had ended; 0 while one is owed or under way."""
    if quiet_since:
        return quiet_since + LINGERS_S
    if not sending.done():
        return begun_at + _SENDING_S
    return sending.result() + (LEAVES_AFTER_S if case.is_abandoned else case.max_s)


async def _send(writer: asyncio.StreamWriter, case: Case) -> float:
    """When the last byte had left."""
    with contextlib.suppress(OSError):  # answered before all was sent
        for number, piece in enumerate(case.pieces):
            await asyncio.sleep(case.pause_s if number else 0)
            writer.write(piece)
            await writer.drain()
    return time.perf_counter()


async def _end(sending: asyncio.Task[float], otherwise: float) -> float:
    if sending.done():
        return sending.result()
    sending.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await sending
    return otherwise
