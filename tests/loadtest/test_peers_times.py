"""How long runs are, and that a server that fails or is slow has no other pay for it; with servers that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.client.target import Target
from loadtest.peers import command, times
from loadtest.peers.command import Contest, Options, Turn
from loadtest.peers.fleet import Fleet
from loadtest.peers.peer import PeerUnavailableError
from loadtest.peers.standings import Measured
from loadtest.peers.times import RunTimes, times_of_round
from loadtest.results.record import Header, Run

EMPTY = Run(Header({"timeout_s": 20.0}, "", "", "", "", {}, "", warmup_s=0.0, duration_s=1.0), ())


class Nobody:
    """A peer that serves nothing; `broken` are the starts, by number, that fail."""

    about = "nobody"
    keeps_limit = True
    start_s = 1.0

    def __init__(self, name: str, broken: tuple[int, ...] = (), *, restarts: bool = False) -> None:
        self.name, self.restarts, self._broken = name, restarts, broken
        self.starts = 0

    def start(self, fleet: Fleet, memory: int) -> Target:
        self.starts += 1
        if self.starts in self._broken:
            raise PeerUnavailableError("it ended with status 1")
        return Target("http://127.0.0.1:1", self.name)

    def stop(self) -> None:
        pass

    def memory_bytes(self) -> int:
        return 0

    def num_loads(self) -> int:
        return 0


def contest(tmp_path: Path, *peers: Nobody, budget_s: float = 560.0) -> Contest:
    return Contest(Options(budget_s=budget_s), Fleet(tmp_path, ("bench/m0",)), peers)


def broken_with(count: int) -> object:
    def measure(self: Turn, wanted: int) -> Measured:
        if self._target is None:
            self._target = self.peer.start(self.models, 8)
            self.standing.starts_s.append(1.0)
        if wanted == count:
            raise RuntimeError("it hung")
        return Measured(wanted, EMPTY, EMPTY, 0, 0)

    return measure


def test_all_runs_and_all_that_is_around_them_fit_into_the_budget() -> None:
    around_s = {"rookery": 30.0, "lru": 20.0}
    planned = times_of_round(600.0, 2, 3, around_s)
    used_s = 2 * (sum(around_s.values()) + 6 * planned.both_s)
    assert used_s == pytest.approx(600.0 * (1 - times.SPARE))
    assert times_of_round(10.0, 2, 3, around_s) == RunTimes(times.LEAST_S, times.LEAST_S)


def test_more_time_goes_to_the_requests_that_latencies_are_of() -> None:
    options = Options()
    peers = command.make_peers(options, Path())
    around_s = {peer.name: command._around_s(peer, options) for peer in peers}
    short, long = (times_of_round(budget_s, 2, 3, around_s) for budget_s in (560.0, 1500.0))
    assert long.busy_s == times.MOST_BUSY_S
    assert 2 * options.rate * short.light_s > 15
    assert 2 * options.rate * long.light_s > 100


def test_who_started_slowly_shortens_the_next_round_for_all_alike() -> None:
    quick = times_of_round(280.0, 1, 3, {"rookery": 20.0, "lru": 20.0})
    slow = times_of_round(240.0, 1, 3, {"rookery": 60.0, "lru": 20.0})
    assert slow.light_s < quick.light_s


def test_one_number_of_models_that_fails_costs_none_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Turn, "_measure", broken_with(8))
    peer = Nobody("lru")
    played = contest(tmp_path, peer)
    played.play()
    (standing,) = played.standings
    assert [turn.count for turn in standing.turns] == [1, 32, 1, 32]
    assert peer.starts == 4  # anew after each failure
    assert standing.reasons[0] == "8 models in round 1: RuntimeError: it hung"


def test_who_never_starts_is_asked_once_and_the_others_have_all_their_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Turn, "_measure", broken_with(0))
    never, other = Nobody("ray", broken=(1, 2, 3)), Nobody("lru")
    played = contest(tmp_path, never, other)
    played.play()
    assert never.starts == 1
    assert played.standings[0].reasons == ["1 models in round 1: it ended with status 1"]
    assert [turn.count for turn in played.standings[1].turns] == [1, 8, 32, 1, 8, 32]


def test_what_there_is_no_time_for_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Turn, "_measure", broken_with(0))
    played = contest(tmp_path, Nobody("lru"), budget_s=0.5)
    played.play()
    assert played.standings[0].turns == []
    assert "no time for 32 models in round 1" in played.standings[0].reasons
