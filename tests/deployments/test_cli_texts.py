"""`rookery generate`, `play` and `bench` against the real API over a loopback socket, with real pipes as stdin."""

from __future__ import annotations

import json
import os
import pty
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from itertools import count
from pathlib import Path

import pytest

from deployments import show
from deployments.cli.bench import Text, summarize
from serve.errors import Overloaded
from serve.types import Delta, GenerationRequest
from tests.deployments.cli_world import Rookery, World, another_program

ADA = "huggingtweets/ada"

Feed = Callable[[bytes], None]


@pytest.fixture
def feed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Feed]:
    """What the next command finds on its stdin."""
    with ExitStack() as stack:

        def fill(content: bytes) -> None:
            file = tmp_path / f"stdin-{len(content)}"
            file.write_bytes(content)
            monkeypatch.setattr(sys, "stdin", stack.enter_context(file.open()))

        yield fill


# --- generate ---------------------------------------------------------------------------------------------


def test_generate_prints_texts_with_an_empty_line_between(rookery: Rookery, world: World) -> None:
    done = rookery("generate", ADA, "My dream is", "-n", 5, "--seed", 7, "--max-tokens", 12)
    texts = done.out.removesuffix("\n").split("\n\n")
    assert (done.code, done.err, len(texts)) == (0, "", 5) and all(text.startswith("My dream is") for text in texts)
    (request,) = world.generator.requests
    assert (request.num_choices, request.seed, request.add_bos) == (5, 7, True)
    assert request.sampling["max_new_tokens"] == 12


def test_streamed_texts_are_the_same_as_whole_ones_in_the_same_order(rookery: Rookery, world: World) -> None:
    for n in (1, 3):
        asked = ("generate", ADA, "Today", "--seed", 3, "-n", n)
        whole = json.loads(rookery(*asked, "--json").out)
        wanted = "\n".join("Today" + show.plain(choice["text"]) + "\n" for choice in whole["choices"])
        assert rookery(*asked, "--stream").out == rookery(*asked, "--no-stream").out == wanted


def test_every_sampling_option_reaches_the_model(rookery: Rookery, world: World) -> None:
    options = {"--temperature": 0.5, "--top-p": 0.9, "--top-k": 40, "--repetition-penalty": 1.2}
    said = [word for option in options.items() for word in option]
    assert rookery("generate", ADA, "Today", *said, "--stop", "tea", "--stop", "!").code == 0
    (request,) = world.generator.requests
    sampling = request.sampling
    assert [sampling["temperature"], sampling["top_p"], sampling["top_k"], sampling["repetition_penalty"]] == [
        *options.values()
    ]
    assert sampling["stop"] == ("tea", "!")


def test_a_seed_that_nobody_gave_is_told_and_gives_the_text_again(rookery: Rookery, world: World) -> None:
    first = rookery("generate", ADA, "Today")
    seed = first.err.removeprefix("The seed was ").removesuffix(".\n")
    assert rookery("generate", ADA, "Today", "--seed", seed).out == first.out
    assert rookery("generate", ADA, "Today", "--quiet").err == ""


@pytest.mark.parametrize(
    ("arguments", "stdin", "prompt"),
    [
        ([], b"I think\n", "I think"),
        (["-"], b"one\r\ntwo\n\n", "one\ntwo"),
        ([], b"", "My dream is"),
        (["-"], b"", ""),
        (["given"], b"not read", "given"),
        ([""], b"not read", ""),
    ],
)
def test_the_prompt_is_the_whole_of_stdin_where_none_is_given(
    rookery: Rookery, world: World, feed: Feed, arguments: list[str], stdin: bytes, prompt: str
) -> None:
    feed(stdin)
    assert rookery("generate", ADA, *arguments, "--json").code == 0
    assert world.generator.requests[-1].prompts == (prompt,)


def test_jsonl_takes_a_prompt_a_line_and_prints_a_text_a_line_in_their_order(
    rookery: Rookery, world: World, feed: Feed
) -> None:
    prompts = [f"Number {number} is 👋" for number in range(20)]
    feed("\n".join(prompts).encode())
    done = rookery("generate", ADA, "--jsonl", "-n", 2, "--seed", 100, "--max-tokens", 8)
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line["prompt"] for line in lines] == [prompt for prompt in prompts for _ in range(2)]
    assert [(line["seed"], line["index"]) for line in lines[:4]] == [(100, 0), (100, 1), (101, 0), (101, 1)]
    assert all(line["model"] == ADA and line["finish_reason"] == "length" and line["text"] for line in lines)
    alone = json.loads(rookery("generate", ADA, prompts[7], "--jsonl", "--seed", 107, "--max-tokens", 8).out)
    assert alone == lines[14]


def test_jsonl_answers_a_line_before_the_next_one_comes(
    rookery: Rookery, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    answers, answering = os.pipe()
    with os.fdopen(reading) as stdin, os.fdopen(answers) as told, os.fdopen(answering, "w", 1) as out:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr("typer.echo", lambda line, **_: print(line, file=out))
        seen: list[str] = []

        def converse() -> None:
            for number in range(3):
                os.write(writing, f"line {number}\n".encode())
                seen.append(json.loads(told.readline())["prompt"])
            os.close(writing)

        talker = threading.Thread(target=converse)
        talker.start()
        assert rookery("generate", ADA, "--jsonl").code == 0
        talker.join(10)
    assert seen == ["line 0", "line 1", "line 2"]


def test_a_prompt_that_is_refused_ends_jsonl_after_the_texts_before_it(
    rookery: Rookery, world: World, feed: Feed
) -> None:
    feed(b"good\n" + b"x" * 2_000_000 + b"\n")  # nothing after it: whose sockets would be left when the command ends
    done = rookery("generate", ADA, "--jsonl")
    assert (done.code, [json.loads(line)["prompt"] for line in done.out.splitlines()]) == (1, ["good"])
    feed(b"\xff\xfe\n")
    assert rookery("generate", ADA, "--jsonl").code == 2


@pytest.mark.parametrize("arguments", [["--json", "--jsonl"], ["--stream", "--json"], ["--temperature", "nan"]])
def test_options_that_do_not_go_together_are_wrong_usage(rookery: Rookery, arguments: list[str]) -> None:
    done = rookery("generate", ADA, "Today", *arguments)
    assert (done.code, done.out) == (2, "")


def test_a_model_that_is_missing_is_an_error_on_stderr_alone(rookery: Rookery, world: World) -> None:
    for more in ([], ["-n", 2], ["--json"], ["--jsonl"], ["--stream"]):
        done = rookery("generate", "huggingtweets/missing", "Today", "--seed", 1, *more)
        assert (done.code, done.out, done.err) == (3, "", "rookery: There is no such model.\n")


def test_a_stream_that_breaks_off_is_an_error_on_a_line_of_its_own(rookery: Rookery, world: World) -> None:
    done = rookery("generate", "huggingtweets/halfway", "Today", "--stream")
    assert (done.code, done.out[-1:]) == (1, "\n")
    assert "no usable numbers" in done.err


@pytest.fixture(params=["after a piece", "within a piece"])
def cut_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server whose streams end before they are done."""

    class Cut(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            piece = b'data: {"choices": [{"index": 0, "text": " is", "finish_reason": null}]}\n\n'
            self.send_response(200)
            if request.param == "within a piece":
                self.send_header("content-length", str(2 * len(piece)))
            self.end_headers()
            self.wfile.write(piece)

    with another_program(Cut) as url:
        yield url


def test_a_stream_that_is_cut_is_no_success(rookery: Rookery, feed: Feed, cut_url: str) -> None:
    feed(b"Today\nnot asked\n")
    for arguments in (["generate", ADA, "Today", "--stream"], ["play", ADA]):
        done = rookery(*arguments, "--url", cut_url)
        assert (done.code, done.out) == (5, "Today is\n") and done.err.count("broke off") == 1


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_wrong_usage(rookery: Rookery, world: World, feed: Feed, seed: int) -> None:
    assert rookery("generate", ADA, "Today", "--seed", seed).code == 2
    feed(f"/seed {seed}\n".encode())
    assert "/seed takes a number from 0" in rookery("play", ADA).err


# --- run --------------------------------------------------------------------------------------------------


def test_run_writes_where_there_is_a_prompt(rookery: Rookery, world: World, feed: Feed) -> None:
    feed(b"I think\n")
    for arguments, prompt in ((["Today"], "Today"), ([], "I think")):
        done = rookery("run", ADA, *arguments)
        assert done.code == 0 and done.out.startswith(prompt) and "The seed was" in done.err
        assert world.generator.requests[-1].prompts == (prompt,)


def test_run_without_a_prompt_in_a_terminal_is_play(
    rookery: Rookery, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    master, slave = pty.openpty()
    with os.fdopen(master, "wb", 0) as keyboard, os.fdopen(slave) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        keyboard.write(b"Today\n/again\n/quit\n")
        done = rookery("run", ADA)
    assert (done.code, len(world.generator.requests)) == (0, 2)


# --- play -------------------------------------------------------------------------------------------------


def test_play_goes_on_with_each_line_and_prints_no_prompt_to_a_pipe(rookery: Rookery, world: World, feed: Feed) -> None:
    feed(b"Today\n\n//slash\n")
    done = rookery("play", ADA, "--seed", 5)
    alone = [rookery("generate", ADA, prompt, "--seed", seed) for prompt, seed in (("Today", 5), ("/slash", 6))]
    assert (done.code, done.err) == (0, "")
    assert done.out == "".join(one.out + "\n" for one in alone)


def test_play_obeys_commands_between_lines(rookery: Rookery, world: World, feed: Feed, tmp_path: Path) -> None:
    commands = ["/seed 3", "/n 2", "/temperature 0.8", "Today", "/again", "/temperature", "/model huggingtweets/bob"]
    commands += ["/n 1", "/again", f"/save {tmp_path / 'all.jsonl'}", f"/save {tmp_path / 'all.txt'}", "/quit", "no"]
    feed("\n".join(commands).encode())
    done = rookery("play", ADA)
    asked = world.generator.requests
    assert done.code == 0
    assert [(one.model_id, one.num_choices, one.seed) for one in asked] == [
        *((ADA, 2, 3), (ADA, 2, 4)),
        ("huggingtweets/bob", 1, 5),
    ]
    assert [one.sampling.get("temperature") for one in asked] == [0.8, 0.8, None]
    saved = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [(one["model"], one["seed"]) for one in saved] == [(ADA, 3), (ADA, 3), (ADA, 4), (ADA, 4)] + [
        ("huggingtweets/bob", 5)
    ]
    assert (tmp_path / "all.txt").read_text().startswith("Today" + saved[0]["text"])


@pytest.mark.parametrize(
    "line",
    [
        "/frobnicate",
        "/again",
        "/n many",
        f"/n {10**400}",
        "/temperature nan",
        "/seed 1.5",
        "/save /",
        "/n 17\nx",
        "/model a b\nx",
    ],
)
def test_a_line_that_play_cannot_do_is_told_and_the_next_one_is_done(
    rookery: Rookery, world: World, feed: Feed, line: str
) -> None:
    feed(f"{line}\n/n 1\n/model {ADA}\nToday\n".encode())
    done = rookery("play", ADA, "--max-tokens", 4)
    assert (done.code, done.err.count("rookery: "), done.out.startswith("Today")) == (1, 1, True)


def test_play_with_nobody_at_the_address_ends_at_once(rookery: Rookery, feed: Feed) -> None:
    feed(b"one\ntwo\n")
    done = rookery("play", ADA, "--url", "http://127.0.0.1:9")
    assert (done.code, done.err.count("No answer")) == (5, 1)


# --- bench ------------------------------------------------------------------------------------------------


def test_bench_tells_tokens_and_times_of_each_number_of_streams(rookery: Rookery, world: World) -> None:
    arguments = ["--streams", "1,3", "--seconds", 0.2, "--max-tokens", 5]
    done = rookery("bench", *arguments, "--models", 2, "--json")
    report = json.loads(done.out)
    assert (done.code, len(report["models"])) == (0, 2)
    for level, streams in zip(report["levels"], (1, 3), strict=True):
        assert level["streams"] == streams and level["errors"] == {} and level["texts"] > 0
        assert level["tokens_per_s"] > 0 and 0 < level["ttft_p50_ms"] <= level["ttft_p99_ms"]
    assert {request.model_id for request in world.generator.requests} == set(report["models"])
    table = rookery("bench", ADA, *arguments).out.splitlines()
    assert [line.split()[0] for line in table[1:]] == ["1", "3"] and table[1].split()[-1] == "none"


def test_bench_counts_errors_and_says_what_is_not_there(rookery: Rookery, world: World) -> None:
    assert rookery("bench", "huggingtweets/missing", "--seconds", 0.1).code == 3
    assert rookery("bench", "--models", 9, "--seconds", 0.1).code == 3
    for wrong in ("0", "a", "1,,2", "2000"):
        assert rookery("bench", "--streams", wrong).code == 2


def test_bench_says_that_figures_with_errors_are_none(
    rookery: Rookery, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, num_asked, num_good = world.generator.generate, count(), 1

    def fail_late(request: GenerationRequest) -> AsyncIterator[list[Delta]]:
        if next(num_asked) >= num_good:
            raise Overloaded("Too many requests.")
        return write(request)

    monkeypatch.setattr(world.generator, "generate", fail_late)
    asked = ("bench", ADA, "--streams", 1, "--seconds", 0.2, "--max-tokens", 2)
    failed = rookery(*asked)
    assert (failed.code, "requests failed: do not use these figures" in failed.err) == (1, True)
    num_asked, num_good = count(), 4
    mixed = rookery(*asked, "--json")
    assert (mixed.code, "do not use" in mixed.err) == (0, True) and json.loads(mixed.out)["levels"][0]["texts"] == 2


def test_a_text_counts_with_the_part_that_came_in_time() -> None:
    texts = [Text(0.0, 1.0, 3.0, 21), Text(0.5, 1.5, 5.5, 41), Text(3.9, 4.1, 4.2, 9), Text(0.0, error="429")]
    level = summarize(texts, 4, seconds=4.0, until=4.0, client_cpu=0.5)
    assert level.tokens_per_s == pytest.approx((21 + 41 * 2.5 / 4) / 4, abs=0.05)
    assert (level.ttft_p50_ms, level.ttft_p99_ms, level.itl_p50_ms) == (1000.0, 1000.0, 100.0)
    assert (level.texts, level.errors) == (3, {"429": 1})
