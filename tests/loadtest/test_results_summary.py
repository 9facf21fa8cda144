from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from loadtest.results.columns import Columns, arrived, in_flight, nearest_rank
from loadtest.results.record import LATE_S, STOPPED, Run
from loadtest.results.summary import share_text, summarize
from tests.loadtest.synthetic import header, queue_run, record

CONTRACT = {
    "requests", "errors", "refused", "cancelled", "p50_ttft_ms", "p99_ttft_ms", "p50_ms", "p99_ms", "tokens_s",
    "cold_share", "hit_rate", "p99_lag_ms", "p50_itl_ms", "requests_s", "usd_per_1000_tweets",
}  # fmt: skip


def test_figures_worked_out_by_hand() -> None:
    """Ten seconds; four answers of 11 tokens that take 1, 2, 3 and 4 s, one refused, one failed, one too late."""
    records = (
        record(0, at_s=0.0, ended_s=1.0, first_s=0.5),
        record(1, at_s=1.0, ended_s=3.0, first_s=1.2, tier="disk", load_s=0.1),
        record(2, at_s=2.0, ended_s=5.0, first_s=2.1),
        record(3, at_s=3.0, ended_s=7.0, first_s=3.3),
        record(4, at_s=4.0, ended_s=4.1, first_s=None, outcome="refused", status=429, error="overloaded", tier=""),
        record(5, at_s=5.0, ended_s=5.1, first_s=None, outcome="failed", status=500, tier=""),
        record(6, at_s=6.0, ended_s=9.0, first_s=None, outcome="timeout", status=0, tier=""),
        record(7, at_s=7.0, ended_s=8.0, first_s=7.5, outcome="cancelled", output_tokens=6),
    )
    total = summarize(Run(header(), records), price_per_hour=3.6)
    assert (total.requests, total.answered, total.errors, total.timeouts) == (8, 4, 2, 1)
    assert (total.refused, total.cancelled) == (1, 1)
    assert (total.error_share, total.refused_share) == (2 / 8, 1 / 8)
    assert (total.mean_ms, total.p50_ms, total.p90_ms, total.p99_ms, total.max_ms) == (2500, 2000, 4000, 4000, 4000)
    assert total.mean_ttft_ms == pytest.approx((500 + 200 + 100 + 300) / 4)
    assert total.p50_ttft_ms == pytest.approx(200)
    assert total.p50_itl_ms == pytest.approx(180)  # 50, 180, 290, 370: 11 tokens have ten times between them
    assert total.hit_rate == 0.75 and total.cold_share == 0.25
    assert total.offered_s == 0.8 and total.requests_s == 0.4
    assert total.goodput_tokens_s == pytest.approx(4.4) and total.tokens_s == pytest.approx(5.0)
    assert total.tweets == 4
    assert total.usd_per_1000_tweets == pytest.approx(0.01 / 4 * 1000)  # 3.60 an hour are a cent for ten seconds
    assert total.kinds == {"overloaded": 1, "status 500": 1, "timeout": 1}
    assert total.tiers["device"].answered == 3 and total.tiers["disk"].p50_load_ms == pytest.approx(100)
    assert list(total.tiers) == ["device", "disk"]


def test_the_json_is_flat_has_the_agreed_names_and_is_plain() -> None:
    line = summarize(queue_run(1), 2.0).to_json()
    assert line.keys() >= CONTRACT
    assert json.loads(json.dumps(line, allow_nan=False)) == line
    nested = {name for name, value in line.items() if isinstance(value, (dict, list))}
    assert nested == {"flows", "tiers", "kinds", "notes"}


def test_requests_of_the_warm_up_are_not_counted_but_their_tokens_in_the_window_are() -> None:
    """An answer from 1 s to 3 s; the window begins at 2 s, in the middle of it."""
    early = record(0, at_s=1.0, first_s=1.0, ended_s=3.0, output_tokens=101)
    total = summarize(Run(header(warmup_s=2.0), (early,)))
    assert total.requests == 0 and total.p50_ms is None
    assert total.tokens_s == pytest.approx(5.0)
    assert total.tweets == 1  # it was finished within the window


def test_what_an_overloaded_server_answers_after_the_window_is_no_throughput() -> None:
    """100 requests in 10 s; the server does one a second, and goes on for 90 s afterwards."""
    records = tuple(
        record(n, at_s=n / 10, first_s=float(n), ended_s=n + 1.0, output_tokens=10, is_streaming=False)
        for n in range(100)
    )
    total = summarize(Run(header(), records))
    assert total.offered_s == 10 and total.answered == 100
    assert total.requests_s == pytest.approx(0.9) and total.tokens_s == pytest.approx(9)


def test_refused_and_failed_requests_are_in_no_latency_and_a_note_says_what_share_they_are() -> None:
    slow = record(0, at_s=0.0, first_s=1.0, ended_s=2.0)
    fast = [
        record(n, at_s=1.0, ended_s=1.001, first_s=None, outcome=outcome)
        for n, outcome in enumerate(("refused", "refused", "failed"), start=1)
    ]
    total = summarize(Run(header(), (slow, *fast)))
    assert total.p50_ms == total.max_ms == 2000
    assert any("25.0 % of requests that were answered: 50.0 % were refused and 25.0 % failed" in n for n in total.notes)


def test_ttft_is_of_streams_and_of_whole_answers_only_where_nothing_was_streamed() -> None:
    stream = record(0, at_s=0.0, first_s=0.2, ended_s=1.0)
    whole = record(1, at_s=0.0, first_s=None, ended_s=3.0, is_streaming=False)
    assert summarize(Run(header(), (stream, whole))).max_ttft_ms == 200
    assert summarize(Run(header(), (whole,))).max_ttft_ms == 3000


def test_the_choices_of_one_answer_share_its_tokens() -> None:
    """Four choices side by side, 44 tokens in 1 s: each reads one every 100 ms."""
    item = record(0, at_s=0.0, first_s=0.0, ended_s=1.0, output_tokens=44, num_choices=4)
    total = summarize(Run(header(), (item,)))
    assert total.p50_itl_ms == pytest.approx(100) and total.tweets == 4


def test_latencies_count_from_when_a_request_was_due() -> None:
    late = record(0, at_s=0.0, sent_s=0.5, first_s=0.6, ended_s=1.0)
    total = summarize(Run(header(), (late,)))
    assert total.p50_ttft_ms == pytest.approx(600) and total.p99_lag_ms == 500
    assert any("tester was late" in note for note in total.notes)


def test_without_tiers_the_hit_rate_is_not_known() -> None:
    total = summarize(Run(header(), (record(0, tier=""),)))
    assert total.hit_rate is None and total.cold_share is None and not total.tiers


def test_an_unknown_tier_is_cold_and_comes_last() -> None:
    total = summarize(Run(header(), (record(0, tier="tape"), record(1, tier="hub"), record(2, tier="device"))))
    assert list(total.tiers) == ["device", "hub", "tape"] and total.cold_share == pytest.approx(2 / 3)


def test_a_run_without_records_has_no_figures_and_says_so() -> None:
    total = summarize(Run(header(), ()), 1.0)
    assert total.requests == 0 and total.p50_ms is None and total.tokens_s == 0 and total.usd_per_1000_tweets is None
    assert "nothing to tell" in total.notes[0]
    json.dumps(total.to_json(), allow_nan=False)


def test_a_run_where_all_were_refused_has_no_latency() -> None:
    records = tuple(record(n, outcome="refused", status=503, first_s=None, tier="") for n in range(5))
    total = summarize(Run(header(), records), 1.0)
    assert total.refused_share == 1 and total.p99_ms is None and total.p99_ttft_ms is None and total.hit_rate is None


def test_a_run_stopped_before_its_window_has_no_rates() -> None:
    total = summarize(Run(header(warmup_s=5.0), (record(0),), stopped_s=1.0))
    assert total.window_s == 0 and total.tokens_s is None


def test_requests_without_an_answer_when_a_run_was_stopped_are_no_errors_but_told_of() -> None:
    """Three answered in a second; the fourth had waited for 7 s when the run was stopped at 10 s of 20."""
    answered = (record(0), record(1), record(2))
    waiting = record(3, ended_s=10.0, first_s=None, outcome="timeout", status=0, error=STOPPED, tier="")
    total = summarize(Run(header(duration_s=20.0), (*answered, waiting), stopped_s=10.0))
    assert (total.requests, total.answered, total.stopped, total.errors, total.timeouts) == (4, 3, 1, 0, 0)
    assert total.max_ms == 1000 and total.kinds == {} and total.requests_s == pytest.approx(0.3)
    assert "The run was stopped after 10.0 s of 20.0." in total.notes
    assert any(
        note.startswith("25.0 % of requests had no answer by then, the oldest after 7.0 s") for note in total.notes
    )
    assert not any("failed" in note for note in total.notes)


def test_a_run_that_was_killed_does_not_know_what_was_waiting() -> None:
    notes = summarize(Run(header(), (record(0),), stopped_s=1.0)).notes
    assert any("had no answer by then are in no figure" in note for note in notes)


def test_a_tester_is_late_from_the_threshold_on_that_it_shows_while_it_runs() -> None:
    for lag_s, is_late in ((0.9 * LATE_S, False), (1.1 * LATE_S, True)):
        notes = summarize(Run(header(), (record(0, sent_s=lag_s),))).notes
        assert any("tester was late" in note for note in notes) == is_late


def test_jobs_are_counted_apart_from_requests() -> None:
    jobs = (
        record(1, kind="train", at_s=0.0, ended_s=30.0),
        record(2, kind="train", at_s=0.0, ended_s=10.0),
        record(3, kind="train", at_s=0.0, ended_s=1.0, outcome="failed"),
    )
    total = summarize(Run(header(), (record(0), *jobs)))
    assert (total.requests, total.jobs, total.jobs_done) == (1, 3, 2)
    assert (total.mean_job_ms, total.p50_job_ms, total.max_job_ms) == (20_000, 10_000, 30_000)


def test_flows_have_figures_of_their_own_that_add_up() -> None:
    run = queue_run(2)
    mixed = Run(run.header, tuple(replace(r, flow="ab"[r.number % 2]) for r in run.records))
    total = summarize(mixed)
    assert set(total.flows) == {"a", "b"}
    assert sum(flow.requests for flow in total.flows.values()) == total.requests
    assert sum(flow.tokens_s or 0 for flow in total.flows.values()) == pytest.approx(total.tokens_s)


def test_few_answers_have_a_p99_with_a_note() -> None:
    total = summarize(Run(header(), tuple(record(n) for n in range(5))))
    assert total.p99_ms == 1000 and any("p99 of 5 answers" in note for note in total.notes)


@pytest.mark.parametrize("price", [0.0, -1.0, float("nan"), float("inf")])
def test_a_price_is_above_zero(price: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        summarize(Run(header(), ()), price)


@pytest.mark.parametrize("num", [1, 2, 3, 99, 100, 101, 1000])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_nearest_rank_is_the_inverse_of_the_distribution(num: int, share: float) -> None:
    values = np.sort(np.random.default_rng(num).random(num))
    assert nearest_rank(values, share) == np.quantile(values, share, method="inverted_cdf")


def test_tokens_that_arrived_agree_with_a_sum_over_single_tokens() -> None:
    run = queue_run(3, duration_s=10)
    edges = np.linspace(0.0, 15.0, 40) + 1e-7
    times = np.sort(
        np.concatenate([np.linspace(r.first_s or 0, r.ended_s, r.output_tokens) for r in run.records if r.first_s])
    )
    fluid = arrived(Columns.of(run.records), edges)
    assert fluid[-1] == pytest.approx(len(times))
    assert np.abs(fluid - np.searchsorted(times, edges)).max() <= len(run.records) / 10


def test_in_flight_counts_what_was_sent_and_has_not_ended() -> None:
    columns = Columns.of([record(0), record(0, at_s=0.5)])
    assert list(in_flight(columns, np.array([0.25, 0.75, 1.25, 2.0]))) == [1, 2, 1, 0]


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0, 5, "0 %"), (5, 5, "100 %"), (1, 100_000, "< 0.1 %"), (99_999, 100_000, "> 99.9 %"), (1, 3, "33.3 %")],
)
def test_a_share_is_never_nothing_of_something(part: int, whole: int, text: str) -> None:
    assert share_text(part, whole) == text
