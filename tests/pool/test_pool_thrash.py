"""Many more models than fit, each asked for without a pause: nobody starves, and one load serves all who wait."""

from __future__ import annotations

from collections import Counter

import pytest

from serve.pool.loader import Loaded
from tests.pool.harness import Borrower, World

NUM_FIT = 4
LOAD_S, TEXT_S, TICK_S = 0.1, 2.0, 0.1


class Crowd:
    """`streams` clients of each of `num_models` models; one asks again as soon as its text of `TEXT_S` is done.

    The streams of one model begin apart, so that it is never idle while it is in memory.
    """

    def __init__(self, num_models: int, streams: int) -> None:
        self.world = World(NUM_FIT, max_parallel_loads=2, min_residency_s=5.0, patience_s=2.0)
        self.clients = [(f"m{model}", stream) for model in range(num_models) for stream in range(streams)]
        self.borrowers: dict[tuple[str, int], Borrower] = {}
        self.asked_at: dict[tuple[str, int], float] = {}
        self.held_at: dict[tuple[str, int], float] = {}
        self.waits_s: list[float] = []
        self.num_texts: Counter[str] = Counter()
        self.streams = streams

    def run(self, seconds: float) -> None:
        for tick in range(round(seconds / TICK_S)):
            for call in self.world.threads.calls.copy():
                self.world.finish_call(call)
            for client in self.clients:
                if tick >= client[1] * TEXT_S / TICK_S / self.streams:
                    self.turn(client)
            self.world.advance(TICK_S)

    def turn(self, client: tuple[str, int]) -> None:
        now, borrower = self.world.loop.now, self.borrowers.get(client)
        if borrower is not None and borrower.state == "holding":
            if client not in self.held_at:
                self.held_at[client] = now
                self.waits_s.append(now - self.asked_at[client])
            if now - self.held_at[client] >= TEXT_S:
                borrower.release()
                self.num_texts[client[0]] += 1
        if borrower is None or borrower.state == "released":
            self.held_at.pop(client, None)
            self.asked_at[client] = now
            self.borrowers[client] = self.world.lease(client[0])

    def close(self) -> None:
        for borrower in self.borrowers.values():
            if borrower.state == "waiting":
                borrower.cancel()
            elif borrower.state == "holding":
                borrower.release()
        self.world.close()


@pytest.mark.parametrize("factor", [1, 2, 4, 10])
def test_models_in_steady_use_take_turns_and_nobody_waits_for_half_a_minute(factor: int) -> None:
    crowd = Crowd(factor * NUM_FIT, streams=2)
    crowd.run(120)
    waiting = [crowd.world.loop.now - crowd.asked_at[c] for c, b in crowd.borrowers.items() if b.state == "waiting"]
    assert max(crowd.waits_s + waiting) < 30
    assert min(crowd.num_texts.values()) > 0 and len(crowd.num_texts) == factor * NUM_FIT
    assert max(crowd.num_texts.values()) <= 4 * min(crowd.num_texts.values())
    crowd.close()


def test_one_load_serves_all_who_wait_for_it() -> None:
    crowd = Crowd(3 * NUM_FIT, streams=4)
    crowd.run(120)
    loads = sum(isinstance(event, Loaded) for event in crowd.world.events)
    assert sum(crowd.num_texts.values()) >= 3 * loads
    crowd.close()
