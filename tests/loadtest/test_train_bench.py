from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.training.bench import Turn, flops_a_token, loss_spread, ratios
from serve.shape import GPT2Shape

ROOT = Path(__file__).resolve().parents[2]


def test_ratios_are_taken_within_a_round_and_a_person() -> None:
    turns = [
        Turn(case, contender, number, rate * speed, 1.0, loss + number)
        for case, speed, loss in (("ada", 1.0, 2.0), ("bob", 10.0, 3.0))
        for contender, rate in (("ours", 30.0), ("fp32", 10.0))
        for number in (0, 1)
    ]
    assert ratios(turns, "fp32", lambda turn: turn.tokens_s) == [3.0] * 4
    assert ratios(turns, "bf16", lambda turn: turn.tokens_s) == []
    assert loss_spread(turns) == pytest.approx(0.5**0.5)


def test_a_token_of_gpt2_small_costs_six_operations_for_each_weight_and_attention() -> None:
    assert flops_a_token(GPT2Shape(50257, 1024, 768, 12, 12, 3072)) == pytest.approx(6 * 123.5e6 + 56.6e6, rel=0.01)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_benchmark_ends_with_one_line_of_json() -> None:
    command = [
        "-m",
        "loadtest.training.bench",
        "--rounds",
        "1",
        "--handles",
        "capt_barnacle",
        "--limit",
        "60",
        "--steps",
        "0",
        "--jobs",
        "1",
    ]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    values = json.loads(done.stdout.splitlines()[-1])
    wanted = ["speedup_vs_trainer_cpu", "valid_loss_ours", "valid_loss_trainer", "tokens_s", "bots_per_hour"]
    assert all(values[key] > 0 for key in wanted)
