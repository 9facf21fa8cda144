from __future__ import annotations

import pytest

from loadtest.client.settle import total_rate
from loadtest.client.slo import BadGoal, Probe, find_rate, keeps_up, least_probe_s, read_goals
from loadtest.results.record import Header, Record, Run
from loadtest.results.summary import Summary
from loadtest.traffic.plan import Arrivals, Flow, Plan

PLAN = Plan("p", "", (Flow("a", Arrivals(rate=6.0)), Flow("b", Arrivals(rate=2.0))), duration_s=30.0, warmup_s=0.0)
RUN = Run(Header({}, "", "", "", "", {}, "", 0.0, 1.0), ())


class Server:
    """Its p99 is 100 ms up to `limit` requests a second, and 1 s above. `luck`: it holds more the first times."""

    def __init__(self, limit: float, luck: int = 0) -> None:
        self._limit, self._luck = limit, luck
        self.plans: list[Plan] = []

    async def play(self, plan: Plan) -> tuple[Run, Summary]:
        self.plans.append(plan)
        limit = self._limit * (1.5 if len(self.plans) <= self._luck else 1)
        took = 100.0 if total_rate(plan) <= limit else 1000.0
        return RUN, Summary(requests=100, answered=100, p99_ttft_ms=took)


async def search(server: Server) -> tuple[Probe | None, list[Probe]]:
    probes: list[Probe] = []
    goals = read_goals(["p99_ttft=500ms"])
    found = await find_rate(PLAN, goals, server.play, rate=total_rate(PLAN), probe_s=3.0, told=probes.append)
    return found, probes


@pytest.mark.parametrize("limit", [1.3, 8.0, 9.0, 100.0, 777.0])
async def test_the_highest_rate_that_holds_is_found_within_a_twentieth(limit: float) -> None:
    found, probes = await search(Server(limit))
    assert found is not None and found.held
    assert limit / 1.06 < found.rate <= limit
    assert len(probes) < 24


async def test_every_probe_is_the_plan_at_another_rate_of_another_seed() -> None:
    server = Server(20.0)
    _, probes = await search(server)
    assert len({plan.seed for plan in server.plans}) == len(server.plans)
    assert {plan.duration_s for plan in server.plans} == {3.0}
    for plan, probe in zip(server.plans, probes, strict=True):
        first, second = (flow.arrivals.rate for flow in plan.flows)
        assert first == pytest.approx(3 * second)
        assert first + second == pytest.approx(probe.rate)


async def test_a_rate_that_held_by_luck_is_not_the_answer() -> None:
    lucky, probes = await search(Server(20.0, luck=4))
    assert lucky is not None
    assert lucky.rate <= 20.0
    assert lucky is probes[-1]


async def test_a_server_that_holds_nothing_is_given_up() -> None:
    found, probes = await search(Server(0.0))
    assert found is None
    assert [probe.rate for probe in probes] == [8.0, 4.0, 2.0, 1.0, 0.5]  # then no request would be due in 3 s


@pytest.mark.parametrize(
    ("text", "field", "limit"),
    [
        ("p99_ttft=500ms", "p99_ttft_ms", 500),
        ("p50_ttft=0.2s", "p50_ttft_ms", 200),
        ("p99=2s", "p99_ms", 2000),
        ("mean_latency=80ms", "mean_ms", 80),
        ("p90_itl=12.5ms", "p90_itl_ms", 12.5),
        ("errors=1%", "errors", 0.01),
    ],
)
def test_goals_are_read(text: str, field: str, limit: float) -> None:
    goal = read_goals([text])[0]
    assert goal.field == field
    assert goal.limit == pytest.approx(limit)
    assert goal.field == "errors" or hasattr(Summary(), goal.field)


@pytest.mark.parametrize(
    "text", ["", "p99", "p98=1s", "p99=1", "p99_ttft=5%", "errors=5ms", "p99=1.2.3s", "max_itl=1s"]
)
def test_a_goal_that_is_none_says_what_it_may_be(text: str) -> None:
    with pytest.raises(BadGoal, match="p99_ttft=500ms"):
        read_goals([text])


def test_refusals_are_errors_and_there_is_always_a_limit_of_them() -> None:
    _, errors = read_goals(["p99=1s"])
    assert errors.text == "errors=1%"
    assert errors.holds(Summary(requests=100, errors=1))
    assert not errors.holds(Summary(requests=100, errors=1, refused=1))
    assert read_goals(["errors=5%"])[0].limit == 0.05


def test_a_run_without_answers_holds_nothing() -> None:
    assert not any(goal.holds(Summary()) for goal in read_goals(["p99=1s"]))


def queued(rate: float, capacity: float, duration_s: float, *, takes_s: float = 0.01) -> Run:
    """Requests that come evenly to a server that begins `capacity` a second, and has each for `takes_s` more."""
    header = Header({}, "", "", "", "", {}, "", 2.0, duration_s)
    free_s, records = 0.0, []
    for number in range(int(rate * (2.0 + duration_s))):
        at_s = number / rate
        free_s = max(at_s, free_s) + 1 / capacity
        records.append(Record(number, "f", "m", at_s, at_s, free_s + takes_s, "ok"))
    return Run(header, tuple(records))


@pytest.mark.parametrize(
    ("rate", "capacity", "takes_s", "held"),
    [
        (122.0, 92.6, 0.01, False),  # after 5 s nobody has waited 4 s yet
        (90.0, 92.6, 0.01, True),
        (90.0, 92.6, 3.5, True),  # many in flight are no queue
        (5.0, 92.6, 0.01, True),
        (200.0, 92.6, 3.5, False),
    ],
)
def test_a_queue_that_grows_is_seen_before_anybody_has_waited_too_long(
    rate: float, capacity: float, takes_s: float, held: bool
) -> None:
    assert keeps_up(queued(rate, capacity, 5.0, takes_s=takes_s)) is held


async def test_a_rate_that_is_not_kept_up_with_does_not_hold_whatever_the_latencies() -> None:
    async def play(plan: Plan) -> tuple[Run, Summary]:
        run = queued(total_rate(plan), 92.6, plan.duration_s)
        return run, Summary(requests=100, answered=100, p99_ms=1000.0)

    goals, probes = read_goals(["p99=4s"]), list[Probe]()
    found = await find_rate(PLAN, goals, play, rate=8.0, probe_s=least_probe_s(goals), told=probes.append)
    assert found is not None
    assert 92.6 / 1.06 < found.rate < 92.6 * 1.06
    assert any(not probe.kept_up and not probe.held for probe in probes)


def test_a_probe_is_twenty_times_as_long_as_the_longest_limit() -> None:
    assert least_probe_s(read_goals(["p99_ttft=500ms", "p99=4s", "errors=1%"])) == 80
    assert least_probe_s(read_goals(["errors=1%"])) == 0
