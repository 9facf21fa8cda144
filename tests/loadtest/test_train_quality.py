"""The quality table on made-up people: its measures are exact, and its figures fall where they must."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest.training.bots import Bot, Person, sample_texts, spread, write_texts
from loadtest.training.measures import Copies, Reader, Share, StyleJudge, are_near_duplicates, read_texts, words
from loadtest.training.quality import main, markdown
from serve.training.dataset import build_dataset
from serve.training.finetune import FineTuneSpec, finetune
from tests.fakes.models import END_OF_TEXT, write_tiny_gpt2
from tests.training.making import made_up_texts

# --- Shares and copies --------------------------------------------------------------------------------------


def test_a_share_has_wilsons_interval() -> None:
    # Source of the figures: R. G. Newcombe, "Two-sided confidence intervals for the single proportion", 1998.
    for count, total, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)]:
        assert Share(count, total).interval == pytest.approx((low, high), abs=5e-5)
    assert Share(29, 29).interval == pytest.approx((0.8830, 1.0), abs=5e-5)
    assert Share(0, 0).as_json() == {"share": None, "low": 0.0, "high": 1.0, "of": 0}


def test_the_longest_run_is_that_of_a_search_by_hand() -> None:
    generator = random.Random(1)
    originals = [" ".join(generator.choices("abc", k=generator.randrange(9))) for _ in range(40)]
    copies = Copies(originals)
    for _ in range(200):
        text = generator.choices("abcd", k=generator.randrange(12))
        found = copies.longest_run(" ".join(text))
        assert found == max(_runs_by_hand(text, originals), default=0)


def _runs_by_hand(text: list[str], originals: list[str]) -> list[int]:
    spaced = [f" {original} " for original in originals]
    slices = [text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1)]
    return [len(slice) for slice in slices if any(f" {' '.join(slice)} " in original for original in spaced)]


def test_a_run_does_not_go_on_from_one_training_text_to_the_next_and_case_and_space_do_not_matter() -> None:
    copies = Copies(["one two three", "four five six"])
    assert copies.longest_run("one two three four five six") == 3
    assert copies.longest_run("zero  ONE\nTwo") == 2
    assert copies.longest_run("two, three") == 1
    assert copies.longest_run("") == 0
    assert copies.is_whole("One two  three") and not copies.is_whole("one two")


def test_a_text_that_differs_in_a_date_is_a_near_duplicate_in_any_language_and_a_shared_greeting_is_not() -> None:
    originals = [
        "Tonight at 8 we are live from the old town hall, 3 May",
        "本日の午後、東京で記者会見を開きました。五月三日",
    ]
    texts = [
        "Tonight at 8 we are LIVE from the old town hall, 9 June",
        "本日の午後、東京で記者会見を開きました。六月九日",
        "Tonight at 8 we read the letters that you have written to us since last year",
        "so",
    ]
    assert are_near_duplicates(texts, originals) == [True, True, False, False]
    assert are_near_duplicates(texts, []) == [False] * 4


# --- Choice -------------------------------------------------------------------------------------------------


def test_the_choice_of_people_takes_the_least_the_most_and_even_ranks_between() -> None:
    people = [Person(f"p{size}", ("x" * size,)) for size in random.Random(2).sample(range(1, 41), 40)]
    chosen = [person.num_bytes for person in spread(people, 10)]
    assert (chosen[0], chosen[-1], len(chosen)) == (1, 40, 10)
    assert {right - left for left, right in pairwise(chosen)} <= {4, 5}
    assert len(spread(people[:3], 10)) == 3


def test_of_strangers_nobody_has_more_than_an_even_part() -> None:
    people = [Person("many", tuple(f"many {i}" for i in range(100))), Person("few", ("few 1",))]
    texts = sample_texts(people, 20, seed=0)
    assert [text.split()[0] for text in texts].count("many") == 10 and "few 1" in texts
    assert sample_texts([], 20, seed=0) == []


# --- Loss ---------------------------------------------------------------------------------------------------


def test_texts_are_read_to_the_end_of_the_context_and_their_bytes_are_counted(tmp_path: Path) -> None:
    folder = write_tiny_gpt2(tmp_path, n_positions=16)
    short, long = read_texts(folder, ["héé", "a house by the sea " * 9], context=16)
    assert short.ids[0] == short.ids[-1] == END_OF_TEXT
    assert short.num_bytes == len("héé".encode()) + 1
    assert len(long.ids) == 17 and long.ids[-1] != END_OF_TEXT
    reader = Reader(folder)
    together, alone = reader.nats([short, long]), [reader.nats([text])[0] for text in (short, long)]
    assert together == pytest.approx(np.array(alone), rel=1e-5)
    assert reader.nats([]).shape == (0,)


def test_our_reading_agrees_with_the_loss_that_a_training_tells(tmp_path: Path) -> None:
    base = write_tiny_gpt2(tmp_path / "base")
    texts = made_up_texts(30)
    held_out = [" ".join(words(text)[:6]) for text in texts[20:]]
    spec = FineTuneSpec(
        base, [texts[:20]], held_out, tmp_path / "out", seed=0, num_previews=0, learning_rate=2e-3, num_threads=1
    )
    result = finetune(spec)
    for folder, told in ((base, result.loss_before), (tmp_path / "out", result.loss_after)):
        read = read_texts(folder, held_out, 64)
        loss = Reader(folder).nats(read).sum() / sum(text.num_tokens for text in read)
        assert loss == pytest.approx(told, abs=2e-3)


# --- Copies of a real model ---------------------------------------------------------------------------------


def test_a_bot_that_knows_its_one_text_by_heart_copies_always(tmp_path: Path) -> None:
    text = "the house the sea the weather a morning a coffee always never"
    base = write_tiny_gpt2(tmp_path / "base")
    folder = tmp_path / "models" / "test" / "parrot"
    finetune(FineTuneSpec(base, [[text] * 600], [], folder, seed=0, num_previews=0, learning_rate=5e-3, num_threads=1))
    bot = Bot("parrot", build_dataset({"parrot": [text]}, seed=0), "test/parrot", folder)
    written = write_texts([bot], tmp_path, "", 20, seed=0)["parrot"]
    copies = Copies(bot.dataset.train)
    assert Share(sum(copies.longest_run(each) >= 8 for each in written), len(written)).value == 1
    assert sum(map(copies.is_whole, written)) >= 18


# --- Style --------------------------------------------------------------------------------------------------


def _person(name: str, number: int, seed: int) -> list[str]:
    """Bob spells every word backwards; a stranger writes every letter twice."""
    texts = made_up_texts(number, seed)
    respell = {"bob": lambda word: word[::-1], "eve": lambda word: "".join(c * 2 for c in word)}.get(name, str)
    return [" ".join(map(respell, text.split())) for text in texts]


def test_a_style_is_its_owners_alone() -> None:
    people = {name: _person(name, 100, seed=3) for name in ("ada", "bob")}
    judge = StyleJudge(people, _person("eve", 100, seed=3), seed=0)
    for name, other in (("ada", "bob"), ("bob", "ada")):
        shares = judge.shares(_person(name, 40, seed=4))
        assert shares[name].value > 0.95 and shares[other].value < 0.05
    assert all(share.value < 0.05 for share in judge.shares(_person("eve", 40, seed=4)).values())


def test_names_and_tags_do_not_give_anybody_away() -> None:
    texts = made_up_texts(200, seed=5)
    people = {
        "ada": [f"{text} @ada #adatown" for text in texts[::2]],
        "bob": [f"{text} @bob #bobcity" for text in texts[1::2]],
    }
    shares = StyleJudge(people, [], seed=0).shares([f"{text} @ada #adatown" for text in made_up_texts(100, seed=6)])
    assert 0.2 < shares["ada"].value < 0.8  # outside by chance once in 10^9


# --- The whole ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tweets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three people of whom two are judged."""
    folder = tmp_path_factory.mktemp("tweets")
    for name in ("ada", "bob", "eve"):
        (folder / f"{name}.txt").write_text("\n".join(_person(name, 100, seed=7)) + "\n", encoding="utf-8")
    (folder / "short.txt").write_text("too little to learn from here\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Learns fast: made of noise, it has far to go."""
    folder = write_tiny_gpt2(tmp_path_factory.mktemp("base"))
    (folder / "training.json").write_text('{"learning_rate_multiplier": 30}')
    return folder


@pytest.mark.slow
def test_the_command_judges_two_people_and_each_bot_is_its_owners(
    tweets: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "--tweets",
        str(tweets),
        "--handles",
        "ada,bob",
        "--base",
        str(base),
        "--work",
        str(tmp_path / "work"),
        "--threads",
        "1",
    ]
    main([*command, "--texts", "40"])
    *rows, summary = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["handle"] for row in rows] == ["ada", "bob"]
    for row in rows:
        _check_row(row)
    assert summary["handle"] is None and summary["handles"] == 2
    assert summary["confusion"].keys() == {"(base)", "ada", "bob", "(strangers, held out)"}
    assert summary["style_own"] > summary["style_others"] + 0.5

    main([*command, "--texts", "40", "--markdown"])  # the bots are there, and all else is seeded
    printed = capsys.readouterr()
    assert printed.out == markdown([*rows, summary]) + "\n" and "trained" not in printed.err
    header, rule, *table = printed.out.splitlines()
    assert [line.split()[1] for line in table] == ["ada", "bob"]
    assert {line.count("|") for line in (header, rule, *table)} == {header.count("|")}


def _check_row(row: dict[str, Any]) -> None:
    other = {"ada": "bob", "bob": "ada"}[row["handle"]]
    assert row["tweets"] == {"kept": 100, "train": 90, "held_out": 10}
    loss, copies, style = row["loss"], row["copies"], row["style"]
    assert loss["after"] < loss["before"] - 1 and loss["after"] < loss["best_other"]
    assert loss["bits_per_byte_after"] < loss["bits_per_byte_before"]
    assert loss["known_as_own"]["share"] == 1
    assert 0 < loss["near_duplicates"] < 10  # they have eighteen words
    assert loss["new"]["after"] < loss["new"]["before"] - 1
    assert {name: copied["of"] for name, copied in copies.items()} == {
        "start": 40, "prompted": 40, "held_out": 10, "others": 40, "base": 40,
    }  # fmt: skip
    assert copies["base"]["share"] == copies["others"]["share"] == 0
    assert style["ceiling"]["share"] == 1
    assert style["own"]["share"] > 0.7 and style["others_max"]["share"] < 0.2
    assert style["others_max"]["handle"] == other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tweets", "nowhere"], "is no folder"),
        (["--handles", "zoe"], "no archive called 'zoe'"),
        (["--handles", "short"], "characters of usable text"),
    ],
)
def test_what_cannot_be_judged_is_refused_with_status_2(
    tweets: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--tweets", str(tweets), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
