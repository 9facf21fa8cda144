"""What the comparison of servers says of runs that were made up."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from loadtest.peers.standings import HEADINGS, VALUES, Measured, Standing, markdown, rows, to_json
from loadtest.results.record import Header, Outcome, Record, Run


def run_of(*records: Record, duration_s: float = 10.0) -> Run:
    plan: Mapping[str, object] = {"name": "made up", "timeout_s": 20.0}
    header = Header(plan, "", "", "", "", {}, "2026-11-21T00:00:00Z", warmup_s=0.0, duration_s=duration_s)
    return Run(header, records)


def record(first_s: float | None, ended_s: float, outcome: Outcome = "ok", tokens: int = 10) -> Record:
    return Record(
        number=0, flow="light", model="bench/m0", at_s=0.0, sent_s=0.0, ended_s=ended_s, outcome=outcome,
        first_s=first_s, output_tokens=tokens,
    )  # fmt: skip


def standing(name: str, first_s: float, tokens: int, *, num_loads: int = 1) -> Standing:
    light = run_of(record(first_s, 2 * first_s), record(first_s, 4 * first_s))
    busy = run_of(record(0.0, 10.0, tokens=tokens))
    return Standing(name, "made up", turns=[Measured(8, light, busy, num_loads, 100 << 20)], starts_s=[2.0, 4.0])


def test_values_are_of_the_light_run_but_for_tokens_and_what_is_called_busy() -> None:
    values = standing("lru", 0.5, 100).values(8)
    assert values["tokens_s"] == pytest.approx(10.0)
    assert values["p50_ttft_ms"] == pytest.approx(500.0)
    assert values["p50_ms"] == pytest.approx(1000.0)
    assert values["p90_ms"] == values["slowest_ms"] == pytest.approx(2000.0)
    assert values["busy_p90_ms"] == pytest.approx(10_000.0)
    assert (values["requests"], values["busy_requests"]) == (2, 1)
    assert values["cold_share"] == 0.5
    assert values["memory_mib"] == 100.0


def test_a_ratio_above_one_means_that_rookery_is_better_in_rates_and_in_times() -> None:
    found = to_json([standing("rookery", 0.1, 300), standing("lru", 0.5, 100)], [8])
    assert found["lru"]["vs_rookery_tokens_s_8"] == pytest.approx(3.0)
    assert found["lru"]["vs_rookery_p50_ttft_ms_8"] == pytest.approx(5.0)
    assert not any(key.startswith("vs_") for key in found["rookery"])
    assert found["lru"]["start_s"] == 3.0


def test_what_was_not_measured_is_null_with_its_reason_and_still_plain_json() -> None:
    missing = Standing("ray", "made up")
    missing.fail("it did not start")
    missing.fail("it did not start")
    found = json.loads(json.dumps(to_json([standing("rookery", 0.1, 300), missing], [8, 32])))
    assert all(found["ray"][f"{name}_{count}"] is None for name in VALUES for count in (8, 32))
    assert found["ray"]["vs_rookery_tokens_s_8"] is None
    assert found["ray"]["reason"] == "it did not start"
    assert found["rookery"]["tokens_s_32"] is None
    assert found["rookery"]["reason"] is None


def test_a_request_without_an_answer_is_as_slow_as_its_timeout() -> None:
    light = run_of(record(0.5, 1.0), record(None, 20.0, "timeout"), record(None, 3.0, "refused"))
    seen = Standing("lru", "made up", turns=[Measured(1, light, run_of(), 0, 0)])
    found = to_json([seen], [1])["lru"]
    assert (found["requests"], found["requests_1"], found["errors"], found["timeouts"]) == (3, 3, 2, 1)
    assert found["p50_ms_1"] == found["p90_ttft_ms_1"] == found["slowest_ms_1"] == pytest.approx(20_000.0)


def test_of_fewer_than_100_requests_the_slowest_is_told_and_no_99th_percentile() -> None:
    def seen(name: str, num: int) -> Standing:
        light = run_of(*(record(0.1, 1.0 + number) for number in range(num)))
        return Standing(name, "made up", turns=[Measured(1, light, run_of(), 0, 0)])

    few = to_json([seen("rookery", 99), seen("lru", 99)], [1])["lru"]
    assert (few["p99_ms_1"], few["vs_rookery_p99_ms_1"], few["slowest_ms_1"]) == (None, None, 99_000.0)
    many = to_json([seen("rookery", 100), seen("lru", 100)], [1])["lru"]
    assert (many["p99_ms_1"], many["vs_rookery_p99_ms_1"]) == (99_000.0, 1.0)
    assert "max" in " ".join(next(rows([seen("lru", 99)], [1])))
    assert "max" not in " ".join(next(rows([seen("lru", 100)], [1])))


def test_every_row_has_a_cell_a_heading_and_who_keeps_no_limit_is_marked() -> None:
    unlimited = standing("transformers", 0.5, 100)
    unlimited.keeps_limit = False
    told = list(rows([standing("rookery", 0.1, 300), unlimited], [8, 32]))
    assert len(told) == 4
    assert all(len(row) == len(HEADINGS) for row in told)
    assert told[1][1] == "transformers (no limit)"
    assert told[3][2] == "–"
    lines = markdown([unlimited], [8]).splitlines()
    assert len({line.count("|") for line in lines}) == 1
