"""Writes the README.md of a trained bot: who, from how many tweets, trained how, and how to use it.

The contents of a huggingtweets card. Names come from strangers' profiles, so they are stripped of control characters
and escaped: for YAML by its own writer, for Markdown by a backslash before everything that could mean something.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from huggingface_hub import ModelCardData

from serve.store.describe import BOT_TAG
from serve.store.model_files import PREPROCESS_RUN, TRAIN_RUN
from serve.store.texts import is_visible, printable
from serve.types import PREVIEW_PROMPT, ModelId

PICTURE = "predictions.png"  # in the model's folder, what links to the model show

_ROWS = {"downloaded": "Tweets downloaded", "retweets": "Retweets", "short": "Short tweets", "kept": "Tweets kept"}
_MEANINGFUL = re.compile(r"([!-/:-@\[-`{-~])")  # ASCII punctuation: all that Markdown lets a backslash make plain


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card tells. `handles` without `@`; names and counts are by handle; an unknown count shows as "?"."""

    model_id: str
    handles: tuple[str, ...]
    base_model: str
    display_names: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # downloaded, retweets, short, kept
    hyperparameters: Mapping[str, float | int | str] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)  # e.g. "train", "evaluation"
    trained_on: str | None = None  # a date


def build_card(facts: CardFacts) -> str:
    """The whole README.md, front matter included. Raises: ModelNotFound when `model_id` cannot be one."""
    sections = [
        f"---\n{_front_matter(facts)}\n---",
        _head(facts),
        f"![The bot, and a prediction of its own]({PICTURE})",
        _introduction(facts),
        _HOW_IT_WORKS,
        _training_data(facts),
        _training_procedure(facts),
        _lineage(facts),
        _how_to_use(facts),
        _LIMITATIONS,
        _ABOUT,
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(facts: CardFacts) -> str:
    data = ModelCardData(
        language="en",
        base_model=printable(facts.base_model),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[BOT_TAG],
        thumbnail=PICTURE,
        widget=[{"text": PREVIEW_PROMPT}],
    )
    return str(data.to_yaml())


def _head(facts: CardFacts) -> str:
    names = " & ".join(escape_markdown(_name(facts, handle)) for handle in facts.handles)
    handles = " & ".join(f"@{escape_markdown(handle)}" for handle in facts.handles)
    kind = "🤖 AI CYBORG 🤖" if len(facts.handles) > 1 else "🤖 AI BOT 🤖"
    return f"# {names}\n\n**{kind}**\n\n{handles}"


def _introduction(facts: CardFacts) -> str:
    account, person = ("accounts", "people") if len(facts.handles) > 1 else ("account", "person")
    return (
        f"This bot writes tweets in the manner of the {account} above. It is a GPT-2 that has read what the {account} "
        f"wrote, and nothing it says was said by the {person}. Give it the beginning of a tweet and it goes on from "
        "there."
    )


_HOW_IT_WORKS = """\
## How does it work?

A language model that already knows the language is trained a little further on the tweets of one account, or of \
several: then it is a cyborg that mixes them. Retweets and very short tweets are left out, links are removed, and \
each tweet becomes one example between two end-of-text marks."""


def _training_data(facts: CardFacts) -> str:
    whose = " and ".join(escape_markdown(_name(facts, handle)) for handle in facts.handles)
    header = ["Data", *(f"@{escape_markdown(handle)}" for handle in facts.handles)]
    rows = [[title, *(_count(facts, handle, key) for handle in facts.handles)] for key, title in _ROWS.items()]
    return (
        f"## Training data\n\nThe model was trained on tweets of {whose}.\n\n{_table(header, rows)}\n\n"
        f"[How the tweets were counted and cleaned]({PREPROCESS_RUN}) is recorded in this folder."
    )


def _training_procedure(facts: CardFacts) -> str:
    base, date = escape_markdown(facts.base_model), escape_markdown(facts.trained_on or "")
    text = f"## Training procedure\n\nThe model is a fine-tune of {base}" + (f", made on {date}." if date else ".")
    if facts.hyperparameters:
        rows = [
            [escape_markdown(str(key)), escape_markdown(str(value))] for key, value in facts.hyperparameters.items()
        ]
        text += "\n\n" + _table(["Hyperparameter", "Value"], rows)
    if facts.losses:
        rows = [[escape_markdown(key), f"{loss:.4f}", _perplexity(loss)] for key, loss in facts.losses.items()]
        text += "\n\n" + _table(["Loss", "Value", "Perplexity"], rows)
    return f"{text}\n\n[Each step of the training run]({TRAIN_RUN}) is recorded in this folder."


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if loss < 100 else "∞"


def _lineage(facts: CardFacts) -> str:
    """The two runs under the names that trackers know them by."""
    name, base = ModelId.parse(facts.model_id).name, escape_markdown(facts.base_model)
    raw = ", ".join(sorted(escape_markdown(f"tweets-{handle.lower()}") for handle in facts.handles))
    dataset = escape_markdown(f"dataset-{name}")
    preprocess, train = (escape_markdown(f"@{name}-{job_type}") for job_type in ("preprocess", "train"))
    rows = [
        [f"[{preprocess}]({PREPROCESS_RUN})", raw, dataset],
        [f"[{train}]({TRAIN_RUN})", f"{dataset}, {base}", escape_markdown(name)],
    ]
    return f"## Lineage\n\n{_table(['Run', 'Used', 'Made'], rows)}"


def _how_to_use(facts: CardFacts) -> str:
    return (
        "## How to use\n\n"
        "With a pipeline for text generation:\n\n"
        "```python\n"
        "from transformers import pipeline\n\n"
        f"generator = pipeline('text-generation', model='{ModelId.parse(facts.model_id)}')\n"
        f'generator("{PREVIEW_PROMPT}", num_return_sequences=5)\n'
        "```"
    )


_LIMITATIONS = """\
## Limitations and bias

The bot has the limits and the biases of the GPT-2 it started from, and repeats those of the tweets it learned from. \
It states falsehoods as readily as facts, and may be offensive. Its texts should not be passed off as a person's own."""


_ABOUT = f"""\
## About

Made by Rookery, after [huggingtweets](https://github.com/borisdayma/huggingtweets) by Boris Dayma. \
The records of both runs are here: [preprocessing]({PREPROCESS_RUN}) and [training]({TRAIN_RUN})."""


def escape_markdown(text: str) -> str:
    """`text` on one line, shown by Markdown as it is written."""
    return _MEANINGFUL.sub(r"\\\1", printable(text))


def _name(facts: CardFacts, handle: str) -> str:
    """The handle where a name has nothing that can be seen."""
    name = printable(facts.display_names.get(handle, ""))
    return name if is_visible(name) else handle


def _count(facts: CardFacts, handle: str, key: str) -> str:
    value = facts.counts.get(handle, {}).get(key)
    return "?" if value is None else str(value)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
