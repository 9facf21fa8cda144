"""How good ten bots are: loss on tweets they have not seen, how much they copy, and whether they have a style.

    python -m loadtest.training.quality [--tweets FOLDER] [--handles a,b] [--work FOLDER] [--markdown]

FOLDER holds one archive a person, called by the handle; the environment's TWEETS names it too. Of all people with
enough text, ten are taken: by bytes of it the least, the most, and evenly placed ranks between them, so that nobody
chooses. Each bot is made from the embedded base as a job would, with a tenth of the texts held out.

Loss: nats a token over the held-out texts, end of text included; bits a byte compare across languages. `best_other`
is the lowest loss that another bot has on (the first 100 of) these texts, and `known_as_own` the share of them that
the person's own bot foresees better than any other bot does. People post nearly the same text more than once; `new` is
the loss on those held-out texts alone that have no near duplicate in training.

Copies: the share of texts that have 8 or more consecutive words (white space between them, case aside) in common with
a single training text. A bot writes with its own defaults, from <|endoftext|> alone (`start`) and after "My dream is"
(`prompted`, whose three words count as its own). People repeat themselves too: `held_out` is their own share, and what
the base and the other bots write is set against the same training texts.

Style: a classifier learns from the training texts whose a text is, and from texts of the people not chosen what
nobody's is (without such people it must always name somebody). `ceiling`: how much of the held-out texts it
recognises. `own`: the share of the bot's texts that it takes for the person's; `others_mean`, `others_max`: the same
for what the other bots write; `base`: for what the base writes. All intervals are Wilson's, 95 %.

On stdout: one JSON object a handle, then a summary; with --markdown the table instead.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loadtest.training.bots import (
    OF_NOBODY,
    Bot,
    Person,
    default_hyperparameters,
    list_archives,
    place_base,
    read_person,
    sample_texts,
    spread,
    train_bot,
    write_texts,
)
from loadtest.training.measures import Copies, Reader, Share, StyleJudge, Text, are_near_duplicates, read_texts
from serve.errors import BadUpload
from serve.store.opening import EMBEDDED
from serve.training.dataset import HELD_OUT_SHARE
from serve.training.finetune import NUM_EPOCHS

logger = logging.getLogger(__name__)

NUM_HANDLES = 10
NUM_TEXTS = 200  # a share of 5 % is then known to within 3 points
MIN_COPIED_WORDS = 8
NUM_STRANGERS_TEXTS = 6_000  # twice what one person has, of many people
NUM_COMPARED = 100  # held-out texts that all bots read; reading is most of the time
PROMPT = "My dream is"
SEED = 0
BASE = "fledgling"
BESIDE_CHECKOUT = Path(__file__).resolve().parents[2] / "shared" / "data" / "tweets"


@dataclass(frozen=True, slots=True)
class Written:
    """What one bot (or the base) wrote. `prompted`: what came after the prompt."""

    start: list[str]
    prompted: list[str]

    @property
    def prompted_whole(self) -> list[str]:
        return [PROMPT + text for text in self.prompted]


# --- The judgement ------------------------------------------------------------------------------------------


def judge(
    people: Sequence[Person],
    strangers: Sequence[str],
    base: Path,
    work: Path,
    *,
    num_texts: int = NUM_TEXTS,
    seed: int = SEED,
    num_threads: int | None = None,
) -> list[dict[str, Any]]:
    """One object a person, and a summary as the last. `strangers`: texts of other people."""
    started = time.monotonic()
    nobody = place_base(base, work)
    bots = [train_bot(person, base, work, seed, num_threads) for person in people]
    trained = time.monotonic()
    logger.info("bots: %d, ready after %.0f s; they write", len(bots), trained - started)
    written = _write(nobody, bots, work, num_texts, seed)
    logger.info("written after %.0f s; now losses", time.monotonic() - started)
    losses = _losses(nobody, bots)
    logger.info("read after %.0f s; now style", time.monotonic() - started)
    styles, confusion = _styles(bots, strangers, written, seed)
    rows = [
        {
            "handle": bot.handle,
            "tweets": bot.dataset.counts[bot.handle],
            **_hyperparameters(bot, base),
            "loss": losses[bot.handle],
            "copies": _copies(bot, written),
            "style": styles[bot.handle],
        }
        for bot in bots
    ]
    facts = {
        "base": BASE if base == EMBEDDED[BASE] else base.name,
        "seed": seed,
        "texts_per_bot_and_prompt": num_texts,
        "train_s": round(trained - started, 1),
        "judge_s": round(time.monotonic() - trained, 1),
    }
    return [*rows, {**_summary(rows, confusion), **facts}]


def _hyperparameters(bot: Bot, base: Path) -> dict[str, float]:
    batch_size, learning_rate = default_hyperparameters(base, [bot.dataset.train] * NUM_EPOCHS)
    return {"batch_size": batch_size, "learning_rate": learning_rate}


def _write(nobody: Bot, bots: Sequence[Bot], work: Path, number: int, seed: int) -> dict[str, Written]:
    everybody = [nobody, *bots]
    start = write_texts(everybody, work, "", number, seed)
    prompted = write_texts(everybody, work, PROMPT, number, seed)
    return {handle: Written(start[handle], prompted[handle]) for handle in start}


def _losses(nobody: Bot, bots: Sequence[Bot]) -> dict[str, dict[str, Any]]:
    reader = Reader(nobody.folder)
    texts = {bot.handle: read_texts(nobody.folder, bot.dataset.held_out, reader.context) for bot in bots}
    before = {handle: reader.nats(held_out) for handle, held_out in texts.items()}
    own, compared = {}, {}  # by reader; `compared` by whose texts, too
    for bot in bots:
        reader = Reader(bot.folder)
        own[bot.handle] = reader.nats(texts[bot.handle])
        compared[bot.handle] = {handle: reader.nats(texts[handle][:NUM_COMPARED]) for handle in texts}
        logger.info("read by %s", bot.handle)

    found: dict[str, dict[str, Any]] = {}
    for bot in bots:
        handle, held_out = bot.handle, texts[bot.handle]
        repeated = np.array(are_near_duplicates(bot.dataset.held_out, bot.dataset.train), dtype=bool)
        found[handle] = {
            **_loss(held_out, before[handle], own[handle]),
            "near_duplicates": int(repeated.sum()),
            "new": _loss([text for text, old in zip(held_out, repeated, strict=True) if not old],
                         before[handle][~repeated], own[handle][~repeated]),
        }  # fmt: skip
        first = held_out[:NUM_COMPARED]
        others = np.array([compared[reader][handle] for reader in texts if reader != handle])  # (others, texts)
        if others.size:
            wins = int((compared[handle][handle] < others.min(0)).sum())
            found[handle] |= {
                "best_other": _round(others.sum(1).min() / sum(text.num_tokens for text in first)),
                "known_as_own": Share(wins, len(first)).as_json(),
            }
    return found


def _loss(texts: Sequence[Text], before: NDArray[np.float64], after: NDArray[np.float64]) -> dict[str, Any]:
    """`before`, `after`: nats of each text, in all of its tokens."""
    if not texts:
        return {"before": None, "after": None}
    tokens, num_bytes = sum(text.num_tokens for text in texts), sum(text.num_bytes for text in texts)
    found: dict[str, Any] = {}
    for when, nats in (("before", float(before.sum())), ("after", float(after.sum()))):
        found |= {
            when: _round(nats / tokens),
            f"perplexity_{when}": _round(math.exp(nats / tokens), 2),
            f"bits_per_byte_{when}": _round(nats / num_bytes / math.log(2)),
        }
    return found


def _copies(bot: Bot, written: Mapping[str, Written]) -> dict[str, Any]:
    copies = Copies(bot.dataset.train)
    own, base = written[bot.handle], written[OF_NOBODY]
    rivals = [text for handle, each in written.items() if handle not in (OF_NOBODY, bot.handle) for text in each.start]
    return {
        name: _copied(copies, texts)
        for name, texts in {
            "start": own.start,
            "prompted": own.prompted_whole,
            "held_out": bot.dataset.held_out,
            "others": rivals,
            "base": base.start,
        }.items()
    }


def _copied(copies: Copies, texts: Sequence[str]) -> dict[str, Any]:
    runs = [copies.longest_run(text) for text in texts]
    return {
        **Share(sum(run >= MIN_COPIED_WORDS for run in runs), len(runs)).as_json(),
        "whole": sum(map(copies.is_whole, texts)),
        "longest_words": max(runs, default=0),
    }


def _styles(
    bots: Sequence[Bot], strangers: Sequence[str], written: Mapping[str, Written], seed: int
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, int]]]:
    """(handle -> its scores, writer -> whom how many of its texts were taken for; the rest is nobody's)."""
    handles = [bot.handle for bot in bots]
    if len(bots) < 2:
        return dict.fromkeys(handles, {}), {}
    unseen = round(len(strangers) * HELD_OUT_SHARE)
    style = StyleJudge({bot.handle: bot.dataset.train for bot in bots}, strangers[unseen:], seed)
    start = {writer: style.shares(each.start) for writer, each in written.items()}
    found = {}
    for bot in bots:
        handle = bot.handle
        others = {writer: start[writer][handle] for writer in handles if writer != handle}
        nearest = max(others, key=lambda writer: others[writer].value)
        found[handle] = {
            "ceiling": style.shares(bot.dataset.held_out)[handle].as_json(),
            "own": start[handle][handle].as_json(),
            "own_prompted": style.shares(written[handle].prompted)[handle].as_json(),
            "others_mean": _round(statistics.fmean(share.value for share in others.values())),
            "others_max": {**others[nearest].as_json(), "handle": nearest},
            "base": start[OF_NOBODY][handle].as_json(),
        }
    writers = start | ({"(strangers, held out)": style.shares(strangers[:unseen])} if unseen else {})
    return found, {writer: {handle: share.count for handle, share in of.items()} for writer, of in writers.items()}


def _summary(rows: Sequence[Mapping[str, Any]], confusion: Mapping[str, Any]) -> dict[str, Any]:
    """Means over people, each counting the same; `handle` is null here."""

    def mean(*path: str) -> float | None:
        values: list[Any] = list(rows)
        for key in path:
            values = [value[key] for value in values if value and key in value]
        known = [value for value in values if value is not None]
        return _round(statistics.fmean(known)) if known else None

    return {
        "handle": None,
        "handles": len(rows),
        "loss_before": mean("loss", "before"),
        "loss_after": mean("loss", "after"),
        "bits_per_byte_before": mean("loss", "bits_per_byte_before"),
        "bits_per_byte_after": mean("loss", "bits_per_byte_after"),
        "loss_before_new": mean("loss", "new", "before"),
        "loss_after_new": mean("loss", "new", "after"),
        "best_other_loss": mean("loss", "best_other"),
        "known_as_own": mean("loss", "known_as_own", "share"),
        **{
            f"copied_{name}": mean("copies", name, "share")
            for name in ("start", "prompted", "held_out", "others", "base")
        },
        **{f"style_{name}": mean("style", name, "share") for name in ("ceiling", "own", "own_prompted")},
        "style_others": mean("style", "others_mean"),
        "style_base": mean("style", "base", "share"),
        "confusion": confusion,
    }


def _round(value: float, digits: int = 4) -> float:
    return round(float(value), digits)


# --- The table ----------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for people, without the summary's confusion."""
    lines = [
        "| | tweets | perplexity before, after | on texts without a near duplicate "
        "| bits a byte before, after | best other bot's perplexity "
        "| copies: bot | held out | base | style: own | other bots, mean and most | base | ceiling |",
        "|---|" + "---:|" * 12,
    ]
    *people, _ = rows
    for row in people:
        loss, copies, style = row["loss"], row["copies"], row["style"]
        new = loss["new"]
        rival = f"{math.exp(loss['best_other']):.1f}" if "best_other" in loss else ""
        cells = [
            row["handle"],
            f"{row['tweets']['kept']:,}",
            f"{loss['perplexity_before']:.1f}, {loss['perplexity_after']:.1f}",
            f"{new['perplexity_before']:.1f}, {new['perplexity_after']:.1f}" if new["after"] is not None else "",
            f"{loss['bits_per_byte_before']:.2f}, {loss['bits_per_byte_after']:.2f}",
            rival,
            _percent(copies["start"], with_interval=True),
            _percent(copies["held_out"], with_interval=True),
            _percent(copies["base"]),
        ]
        if style:
            mean = f"{100 * style['others_mean']:.0f}"
            cells += [
                _percent(style["own"], with_interval=True),
                f"{mean}, {_percent(style['others_max'])}",
                _percent(style["base"]),
                _percent(style["ceiling"]),
            ]
        else:
            cells += [""] * 4
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(share: Mapping[str, Any], *, with_interval: bool = False) -> str:
    if share["share"] is None:
        return ""
    reach = f" ({100 * share['low']:.0f}–{100 * share['high']:.0f})" if with_interval else ""
    return f"{100 * share['share']:.0f} %{reach}"


# --- The command --------------------------------------------------------------------------------------------


def choose_people(folder: Path, named: Sequence[str]) -> tuple[list[Person], list[Person]]:
    """Those named, else ten by the rule; and all others. Raises: BadUpload; KeyError for one without an archive."""
    archives = list_archives(folder)
    everybody = {handle: read_person(handle, archives[handle]) for handle in named}
    for handle in sorted(archives.keys() - everybody.keys()):
        try:
            everybody[handle] = read_person(handle, archives[handle])
        except BadUpload as exc:
            logger.info("without %s: %s", handle, exc.message)
    chosen = [everybody[handle] for handle in named] or spread(list(everybody.values()), NUM_HANDLES)
    return chosen, [person for person in everybody.values() if person not in chosen]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tweets", type=Path, default=os.environ.get("TWEETS") or BESIDE_CHECKOUT)
    parser.add_argument("--handles", default="", help="instead of the ten, with commas between")
    parser.add_argument("--base", type=Path, default=EMBEDDED[BASE], help="a model folder")
    parser.add_argument("--texts", type=int, default=NUM_TEXTS, help="that each bot writes, for each prompt")
    parser.add_argument("--limit", type=int, help="use only so many texts a person: for a quick look")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, help="of training; torch's own choice unless given")
    parser.add_argument("--work", type=Path, help="keeps the bots, so that the next run need not make them again")
    parser.add_argument("--markdown", action="store_true", help="print the table")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _arguments(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    for name in (__name__, "loadtest.training.bots"):
        logging.getLogger(name).setLevel(logging.INFO)
    folder = Path(arguments.tweets)
    if not folder.is_dir():
        sys.exit(_refuse(f"There are no tweets to learn from: {folder} is no folder. Name one with --tweets FOLDER."))
    try:
        people, others = choose_people(folder, [h for h in arguments.handles.split(",") if h])
    except KeyError as exc:
        sys.exit(_refuse(f"There is no archive called {exc.args[0]!r} in {folder}."))
    except BadUpload as exc:
        sys.exit(_refuse(exc.message))
    if not people:
        sys.exit(_refuse(f"Nobody in {folder} has enough text to learn from."))
    people = [replace(person, kept=person.kept[: arguments.limit]) for person in people]
    strangers = sample_texts(others, NUM_STRANGERS_TEXTS, arguments.seed)
    with ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        rows = judge(
            people,
            strangers,
            arguments.base,
            work,
            num_texts=arguments.texts,
            seed=arguments.seed,
            num_threads=arguments.threads,
        )
    print(markdown(rows) if arguments.markdown else "\n".join(json.dumps(row) for row in rows))  # noqa: T201


def _refuse(message: str) -> int:
    print(message, file=sys.stderr)  # noqa: T201
    return 2


if __name__ == "__main__":
    main()
