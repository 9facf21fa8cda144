"""The engine's benchmark runs end to end and reports all that it promises; peers are checked without running them."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loadtest.engine.work import CASES, Case, Rounds, Work
from loadtest.models import SHAPES, write_random_gpt2
from loadtest.peers import gguf

PROMISED = {
    "vs_generate_8x1_bf16", "vs_generate_8x4_bf16", "vs_generate_8x1_int8", "vs_generate_8x4_int8",
    "vs_llamacpp_1", "vs_llamacpp_8", "vs_llamacpp_32", "vs_llamacpp_8x1", "vs_llamacpp_8x4",
    "floor_ratio_bf16", "floor_ratio_int8", "cold_start_ms", "vs_from_pretrained_load", "vs_llamacpp_swap",
    "http_efficiency", "ttft_added_ms",
}  # fmt: skip


@pytest.mark.slow
def test_the_script_runs_and_its_last_line_has_every_promised_value(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loadtest.engine.bench", "--tiny", "--peers", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    *report, last = done.stdout.strip().splitlines()
    values = json.loads(last)
    assert values.keys() >= PROMISED
    assert values["vs_generate_8x1_bf16"] > 0
    assert values["floor_ratio_bf16"] > 0
    missing = [key for key in PROMISED if values[key] is None]
    assert all(any(line.startswith(f"without {key}: ") for line in report) for key in missing), "a null has its reason"


def test_a_converted_matrix_has_one_row_for_each_output_and_q8_0_is_close_to_it(tmp_path: Path) -> None:
    write_random_gpt2(tmp_path / "m", seed=0, shape=SHAPES["tiny"])
    fc = load_file(tmp_path / "m" / "model.safetensors")["transformer.h.0.mlp.c_fc.weight"]
    plain, quantized = tmp_path / "m.bf16.gguf", tmp_path / "m.q8_0.gguf"
    gguf.convert(tmp_path / "m", plain, "bf16")
    gguf.convert(tmp_path / "m", quantized, "q8_0")
    wanted = fc.t().contiguous()  # (256, 64)
    assert wanted.view(torch.int16).numpy().tobytes() in plain.read_bytes()

    row = wanted[0, :32].float()
    scale = (row.abs().max() / 127).half()
    block = struct.pack("<e32b", float(scale), *(row / (row.abs().max() / 127)).round().to(torch.int8).tolist())
    assert block in quantized.read_bytes()
    assert len(quantized.read_bytes()) < 0.65 * len(plain.read_bytes())


class _Counting:
    """A contender that makes its tokens at once and notes its turns."""

    def __init__(self, name: str, turns: list[str]) -> None:
        self.name = name
        self.cases = frozenset({"8x1"})
        self._turns = turns

    def run(self, case: Case, work: Work, seed: int) -> int:
        self._turns.append(self.name)
        return work.num_tokens * case.models * case.streams


def test_contenders_take_turns_and_a_ratio_compares_the_same_round() -> None:
    turns: list[str] = []
    rounds = Rounds([_Counting("ours", turns), _Counting("theirs", turns)], Work())
    for _ in range(3):
        rounds.take(between=lambda: None)
    assert turns == ["ours", "theirs"] * 3
    rounds.rates["ours", "8x1"] = [10.0, 40.0, 30.0]
    rounds.rates["theirs", "8x1"] = [5.0, 10.0, 10.0]
    assert rounds.ratio("ours", "theirs", "8x1") == 3.0
    assert rounds.ratio("ours", "nobody", "8x1") is None
    assert {case.name for case in CASES} == {"1", "8", "32", "8x1", "8x4"}
