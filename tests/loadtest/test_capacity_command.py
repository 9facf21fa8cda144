"""plan-capacity: how many replicas, from the traffic to the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from loadtest.capacity.calibrate import Judge, Probe, fit_neighbours, fit_steps, medians
from loadtest.capacity.command import BadPromise, Demand, Promise, plan, plan_capacity, rate_of, search
from loadtest.capacity.costs import PRESETS, BadCosts, StepCosts, costs_of
from loadtest.capacity.figures import figures
from loadtest.capacity.simulate import Cluster, simulate
from loadtest.capacity.workload import Traffic, draw


def app() -> typer.Typer:
    made = typer.Typer()
    made.command()(plan_capacity)
    return made


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 120))
def test_the_search_finds_the_least_number(least: int, most: int, begin: int) -> None:
    assert search(lambda number: number >= least, most, begin) == (least if least <= most else None)


def test_a_promise_is_read_as_it_is_written() -> None:
    assert Promise.parse("p99_ttft=500ms") == Promise(99, True, 0.5)
    assert Promise.parse("p99.9=2s") == Promise(99.9, False, 2.0)
    for wrong in ("p99_ttft", "fast", "p99_ttft=500", "p100=1s"):
        with pytest.raises(BadPromise, match="p99_ttft=500ms"):
            Promise.parse(wrong)


def test_posts_a_day_become_a_rate() -> None:
    assert rate_of(50_000, 20, 2.5) == pytest.approx(50_000 * 20 / 86_400 * 2.5)


def test_the_number_found_holds_the_promise_and_one_less_does_not() -> None:
    workload = draw(Traffic(40.0, 200), duration_s=30, seed=1)
    answer = plan(Demand.whole(workload), PRESETS["cpu"], Promise.parse("p99_ttft=400ms"), 64, price_per_hour=0.1)
    by_number = {row.replicas: row for row in answer.rows}
    assert answer.replicas is not None and answer.replicas > 1
    assert by_number[answer.replicas].holds and not by_number[answer.replicas - 1].holds
    assert by_number[answer.replicas].usd_per_hour == pytest.approx(0.1 * answer.replicas)
    assert {row.binds for row in answer.rows} <= {"compute", "memory", "loads"}


def test_where_too_few_are_allowed_it_says_so() -> None:
    workload = draw(Traffic(200.0, 200), duration_s=5, seed=1)
    assert plan(Demand.whole(workload), PRESETS["cpu"], Promise.parse("p99_ttft=100ms"), 2, None).replicas is None


def test_compute_binds_where_loads_are_free_and_loads_where_steps_are() -> None:
    workload = draw(Traffic(100.0, 400), duration_s=10, seed=1)
    cpu = PRESETS["cpu"]
    promise = Promise.parse("p99_ttft=100ms")
    free_loads = replace(cpu, slots=1_000, load=replace(cpu.load, host_s=1e-6, disk_s=1e-6))
    assert plan(Demand.whole(workload), free_loads, promise, 1, None).rows[0].binds == "compute"
    free_steps = replace(cpu, slots=4, step=StepCosts(1e-6, 1e-6, 1e-6))
    assert plan(Demand.whole(workload), free_steps, promise, 1, None).rows[0].binds in ("loads", "memory")


def test_the_command_ends_with_a_line_of_json() -> None:
    words = ["--rate", "20", "--models", "100", "--device", "cpu", "--slo", "p99_ttft=2s", "--json"]
    done = CliRunner().invoke(app(), words)
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert answer["replicas"] >= 1 and answer["rows"][0]["figures"]["requests"] > 0


def test_a_plan_is_replayed_and_asks_for_what_only_a_server_could_tell(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(
        'about = "a test"\nduration_s = 20\n[arrivals]\ntimes_capacity = 0.5\n[models]\ntimes_fit = 2\n',
        encoding="utf-8",
    )
    done = CliRunner().invoke(app(), [str(path), "--device", "cpu", "--rate", "20", "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert 6 < answer["rate"] < 14  # Poisson of mean 200 in 20 s or so, with a fixed seed
    refused = CliRunner().invoke(app(), [str(path), "--device", "cpu"])
    assert refused.exit_code == 2 and "--rate" in refused.output


def test_the_command_names_what_it_cannot_use() -> None:
    for words in (["--rate", "1", "--device", "abacus"], [], ["--rate", "1", "--slo", "soon"]):
        done = CliRunner().invoke(app(), words)
        assert done.exit_code == 2


@pytest.mark.parametrize(
    "words",
    ["--models 0", "--rate nan", "--rate inf", "--rate 0", "--tokens -5", "--max-replicas 0", "--price-per-hour nan"],
)
def test_numbers_that_are_none_are_refused_before_anything_is_simulated(words: str) -> None:
    done = CliRunner().invoke(app(), ["--rate", "5", *words.split()])
    assert done.exit_code == 2 and words.split()[0] in done.output


def test_a_backlog_that_grows_is_no_promise_held_though_most_requests_came_before_it() -> None:
    step = StepCosts(base_s=0.010, per_model_s=0.0, per_row_s=0.0)
    one_row = replace(PRESETS["cpu"], step=step, max_sequences=1, request_s=0.0, max_step_rows=1000)
    workload = draw(Traffic(1.03, 1, tokens=100, prompt_tokens=1, spread=0.0), duration_s=200, seed=1)
    outcome = simulate(workload, Cluster(one_row, 1, is_warm=True))
    ttft_s = np.sort(outcome.first_s - workload.at_s)
    half, late = ttft_s[len(ttft_s) // 2], ttft_s[int(len(ttft_s) * 0.75)]
    assert Promise(50, True, float(half)).measure_s(outcome) > late
    assert not Promise(50, True, float(half)).holds(outcome)


def test_a_slice_is_as_busy_and_hits_as_often_as_the_whole() -> None:
    traffic, num_replicas = Traffic(320.0, 800, tokens=20), 32
    found = {}
    for simulated in (32, 16):
        part = simulated / num_replicas
        workload = draw(traffic, duration_s=60, seed=1, part=part, spread_from=2 / num_replicas)
        found[simulated] = figures(simulate(workload, Cluster(PRESETS["cpu"], simulated, is_warm=True)))
        assert len(workload) == pytest.approx(320 * 60 * part, rel=0.05)
    whole, part_of_it = found[32], found[16]
    assert part_of_it.utilisation == pytest.approx(whole.utilisation, rel=0.08)
    assert part_of_it.hit_rate == pytest.approx(whole.hit_rate, abs=0.03)
    assert part_of_it.p50_ms == pytest.approx(whole.p50_ms, rel=0.2)


def test_large_traffic_is_simulated_for_a_minute_by_a_slice_of_whole_hosts() -> None:
    demand = Demand.of(Traffic(20_000.0, 1_000), PRESETS["h100"])
    workload, simulated = demand.at(100)
    assert 32 <= simulated < 100 and simulated % PRESETS["h100"].replicas_per_host == 0
    assert workload.at_s[-1] == pytest.approx(60, abs=0.1)
    assert Demand.of(Traffic(20.0, 1_000), PRESETS["h100"]).at(4)[1] == 4


def test_costs_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(PRESETS["h100"].to_json())
    assert costs_of(str(path)) == PRESETS["h100"]
    path.write_text('{"name": "x"}')
    with pytest.raises(BadCosts, match="does not hold costs"):
        costs_of(str(path))


def test_a_fit_finds_the_costs_that_probes_were_made_with() -> None:
    true = StepCosts(0.001, 0.004, 0.0003, 8, 0.0005)
    shapes = [(1, 1), (1, 4), (1, 8), (1, 14), (2, 1), (4, 1), (2, 4), (4, 3)]
    probes = [Probe(m, m * n, true.step_s(m, m * n), 0.01, 1.0) for m, n in shapes]
    fitted = fit_steps(probes)
    assert fitted.per_model_s == pytest.approx(true.per_model_s)
    assert fitted.per_row_beyond_s == pytest.approx(0.0005)
    assert fitted.step_s(6, 12) == pytest.approx(true.step_s(6, 12))


def test_of_several_rounds_medians_count_and_one_that_was_disturbed_does_not() -> None:
    true = StepCosts(0.001, 0.004, 0.0003)
    shapes = [(1, 1), (1, 4), (2, 1), (2, 3), (4, 1), (4, 2)]
    rounds = [
        Probe(m, m * n, true.step_s(m, m * n) * (3 if number == 1 else 1), 0.01, 1.0, num_texts=n)
        for number in range(3)
        for m, n in shapes
    ]
    found = medians(rounds)
    assert len(found) == len(shapes)
    assert fit_steps(found).step_s(3, 6) == pytest.approx(true.step_s(3, 6), rel=0.01)


def test_what_a_neighbour_slows_is_told_apart_into_reading_and_the_rest() -> None:
    alone = StepCosts(0.001, 0.004, 0.0005)
    true = replace(alone, while_neighbour=0.1, reading_while_neighbour=0.9)
    probes = [Probe(m, m * n, true.slowed_s(m, m * n, 1.0), 0.01, 1.0) for m, n in ((1, 2), (1, 8), (3, 2), (4, 1))]
    assert fit_neighbours(probes, alone) == pytest.approx((0.9, 0.1), abs=0.01)


def test_what_cannot_be_true_is_the_presets_and_is_said() -> None:
    judge = Judge("cpu")
    assert judge.choose("request_s", 0.004, 1e-5, 0.25, 0.1) == 0.004 and not judge.notes
    for fitted in (-0.003, 7.0, float("nan")):
        assert judge.choose("request_s", fitted, 1e-5, 0.25, 0.1) == 0.1
    assert len(judge.notes) == 3 and "preset cpu" in judge.notes[0] and "-0.003" in judge.notes[0]


def test_a_fit_has_no_negative_costs() -> None:
    probes = [Probe(1, 1, 0.004, 0.01, 1.0), Probe(2, 2, 0.009, 0.01, 1.0), Probe(4, 4, 0.02, 0.01, 1.0)]
    fitted = fit_steps(probes)
    assert min(fitted.base_s, fitted.per_model_s, fitted.per_row_s) >= 0
