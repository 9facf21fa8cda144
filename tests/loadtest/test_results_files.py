from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.results.files import BadResult, Writer, read, write
from loadtest.results.record import MOST_GAPS, Record, Run
from loadtest.results.summary import summarize
from tests.loadtest.synthetic import header, record

SECONDS = st.floats(min_value=0, max_value=1e6).map(lambda value: round(value, 6))
RECORDS = st.builds(
    Record,
    number=st.integers(0, 10**6),
    flow=st.text(max_size=20),
    model=st.text(max_size=20),
    at_s=SECONDS,
    sent_s=SECONDS,
    ended_s=SECONDS,
    outcome=st.sampled_from(["ok", "refused", "failed", "cancelled", "timeout"]),
    status=st.integers(0, 599),
    error=st.text(max_size=20),
    first_s=st.none() | SECONDS,
    tier=st.sampled_from(["", "device", "host"]),
    load_s=st.none() | SECONDS | st.just(1e300),
    output_tokens=st.integers(0, 1000),
    num_choices=st.integers(1, 8),
    is_streaming=st.booleans(),
    gaps_s=st.lists(SECONDS, max_size=3).map(tuple),
    kind=st.sampled_from(["generate", "train"]),
)


@settings(max_examples=30)
@given(records=st.lists(RECORDS, max_size=5))
def test_what_was_written_is_read_again(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("run") / "run.jsonl"
    run = Run(header(facts={"models": 3}), tuple(records))
    write(path, run)
    assert read(path) == run


def test_a_field_with_its_default_is_not_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write(path, Run(header(), (record(),)))
    line = json.loads(path.read_text().splitlines()[1])
    assert line["at_s"] == 0 and "error" not in line and "kind" not in line


def test_a_record_is_in_the_file_as_soon_as_it_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "run.jsonl"
    with Writer(path, header()) as writer:
        writer.append(record(1))
        assert read(path).records == (record(1),)
        assert read(path).stopped_s == record(1).ended_s
    assert read(path).stopped_s is None


def test_a_run_that_was_killed_leaves_a_readable_file_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    code = (
        "import sys, os; from pathlib import Path; from loadtest.results.files import Writer;"
        "from tests.loadtest.synthetic import header, record;"
        "writer = Writer(Path(sys.argv[1]), header()).__enter__();"
        "[writer.append(record(n)) for n in range(3)]; print('written', flush=True); sys.stdin.read()"
    )
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    run = read(path)
    assert [item.number for item in run.records] == [0, 1, 2]
    assert run.stopped_s == 3.0 and run.notes == ()
    assert "The run was stopped after 3.0 s of 10.0." in summarize(run).notes
    assert run.window_s == (0.0, 3.0)  # rates are over what was seen


def test_a_run_left_by_an_exception_did_not_go_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with pytest.raises(KeyboardInterrupt), Writer(path, header()) as writer:
        writer.append(record())
        raise KeyboardInterrupt
    assert read(path).stopped_s == 1.0


def test_a_stopped_run_stays_stopped_when_it_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write(path, Run(header(), (record(),), stopped_s=1.0))
    assert read(path).stopped_s == 1.0


def test_a_file_cut_anywhere_is_readable_after_its_header(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    write(whole, Run(header(), (record(1, model="ada/bücher"), record(2))))
    content = whole.read_bytes()
    after_header = content.index(b"\n") + 1
    for end in range(after_header, len(content)):
        cut.write_bytes(content[:end])
        run = read(cut)
        assert len(run.records) <= 2
        is_inside = content[end - 1 : end] != b"\n" and content[end : end + 1] != b"\n"
        assert any("was cut" in note for note in run.notes) == is_inside
        assert (run.stopped_s is not None) == (end < len(content) - 1)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "not a line of JSON"),
        (b"[1]", "an object was expected, not list"),
        (b"\xff\xfe", "not a line of JSON"),
        (b"[" * 100_000, "not a line of JSON"),
        (b'{"number":1}', "at_s, ended_s, flow, model, outcome, sent_s missing"),
        (b'{"at_s":NaN}', "NaN is no number of JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path: Path, line: bytes, why: str) -> None:
    path = tmp_path / "run.jsonl"
    write(path, Run(header(), (record(1), record(2))))
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1], line, *lines[2:]]))
    with pytest.raises(BadResult) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, line 3: ") and why in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"at_s": "soon"}, "at_s is 'soon', expected a number"),
        ({"at_s": 1e999}, "expected seconds, from 0 to"),
        ({"at_s": 10**400}, "at_s is 1000"),
        ({"at_s": 1e300}, "expected seconds, from 0 to 1,000,000,000"),
        ({"load_s": 1e999}, "expected a finite number"),
        ({"outcome": "great"}, 'outcome is \'great\', expected one of "ok", "refused"'),
        ({"outcome": ["ok"]}, 'outcome is [\'ok\'], expected one of "ok", "refused"'),
        ({"output_tokens": -1}, "output_tokens is -1, expected a whole number"),
        ({"output_tokens": True}, "output_tokens is True, expected a whole number"),
        ({"gaps_s": [1, "x"]}, "expected a number"),
        ({"gaps_s": 1}, "expected a list"),
        ({"model": "a" * 500, "tier": 5}, "tier is 5, expected a text"),
        ({"colour": 1}, "unknown field 'colour'"),
        ({"is_streaming": 1}, "is_streaming is 1, expected true or false"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, changes: dict[str, object], why: str) -> None:
    path = tmp_path / "run.jsonl"
    write(path, Run(header(), (record(1),)))
    head, line, *_ = path.read_text().splitlines()
    text = json.dumps(json.loads(line) | changes)
    path.write_text(f"{head}\n{text.replace('Infinity', '1e999')}\n")
    with pytest.raises(BadResult, match="line 2") as caught:
        read(path)
    assert why in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("content", [b"", b"\n", b"{}\n", b'{"format":"other"}\n', b"PNG\x89", b'{"format":'])
def test_a_file_without_a_header_is_no_result(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadResult, match="line 1"):
        read(path)


def test_two_files_in_one_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write(path, Run(header(), (record(1),)))
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(BadResult, match="after the one that ends the run"):
        read(path)


def test_times_are_kept_to_the_microsecond(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write(path, Run(header(), (replace(record(), ended_s=1.23456789),)))
    assert read(path).records[0].ended_s == 1.234568


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"duration_s": -1.0}, "duration_s is -1.0, expected seconds, from 0"),
        ({"duration_s": 1e15}, "expected seconds, from 0 to 1,000,000,000"),
        ({"notes": "none"}, "notes is 'none', expected a list"),
        ({"versions": {"rookery": 1}}, "expected a text"),
    ],
)
def test_a_wrong_value_of_the_header_is_named(tmp_path: Path, changes: dict[str, object], why: str) -> None:
    path = tmp_path / "run.jsonl"
    write(path, Run(header(), ()))
    path.write_text(json.dumps(json.loads(path.read_text().splitlines()[0]) | changes) + "\n")
    with pytest.raises(BadResult, match="line 1: ") as caught:
        read(path)
    assert why in str(caught.value)


@pytest.mark.parametrize("line", ['{"run_ended_s":"x"}', '{"run_ended_s":1,"more":2}', '{"run_ended_s":1e999}'])
def test_a_wrong_end_of_a_run_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "run.jsonl"
    write(path, Run(header(), (record(),), stopped_s=1.0))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(BadResult, match="line 3: "):
        read(path)


def test_a_line_without_an_end_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write(path, Run(header(), ()))
    with path.open("ab") as file:
        file.truncate(2**40)  # a hole: it takes no disk
    with pytest.raises(BadResult, match="longer than 16,777,216 bytes"):
        read(path)


def test_what_was_known_before_a_run_is_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write(path, Run(header(notes=("It has 3 models and not 8.",)), (record(),)))
    assert summarize(read(path)).notes[0] == "It has 3 models and not 8."


def test_of_very_many_gaps_as_many_quantiles_are_kept() -> None:
    gaps = [number / 1000 for number in range(10 * MOST_GAPS)]
    kept = record(gaps_s=tuple(reversed(gaps))).gaps_s
    assert len(kept) == MOST_GAPS and min(kept) == 0 and max(kept) == pytest.approx(gaps[-1])
    assert sorted(kept)[MOST_GAPS // 2] == pytest.approx(gaps[len(gaps) // 2], rel=0.01)


def test_a_record_takes_little_memory(tmp_path: Path) -> None:
    """A run of an hour at 100 requests a second is 0.2 GB: see `Record`."""
    path = tmp_path / "run.jsonl"
    gaps = tuple(np.random.default_rng(0).uniform(0.001, 0.1, 40).tolist())
    write(path, Run(header(), tuple(record(n, request_id=f"{n:032x}", gaps_s=gaps) for n in range(1_000))))
    read(path)  # what is made once
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        run = read(path)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(run.records) == 1_000
    assert after - before < 1_000 * 800 and peak - after < 200_000  # bytes


def test_half_a_character_can_be_printed_once_it_was_read(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write(path, Run(header(facts={"\ud800": ["\udcff"]}), (record(model="\ud83d", flow="\U0001f600"),)))
    run = read(path)
    assert run.header.facts == {"?": ["?"]} and (run.records[0].model, run.records[0].flow) == ("?", "\U0001f600")
