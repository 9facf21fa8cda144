"""The card holds all that huggingtweets' cards held, and nothing a profile's name smuggles in."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from huggingface_hub import ModelCard

from serve.errors import ModelNotFound
from serve.store.card import PICTURE, CardFacts, build_card
from serve.store.model_files import PREPROCESS_RUN, TRAIN_RUN

ADA = CardFacts(
    model_id="huggingtweets/ada",
    handles=("ada",),
    base_model="openai-community/gpt2",
    display_names={"ada": "Ada"},
    counts={"ada": {"downloaded": 3214, "retweets": 123, "short": 45, "kept": 3046}},
    hyperparameters={"epochs": 4, "seed": 7},
    losses={"train": 3.21, "evaluation": 3.3},
    trained_on="2024-05-06",
)


def front_matter(text: str) -> dict[str, Any]:
    return dict(ModelCard(text).data.to_dict())  # type: ignore[no-untyped-call]


def test_card_of_one_account_tells_everything() -> None:
    text = build_card(ADA)
    for part in (
        "# Ada",
        "@ada",
        "🤖 AI BOT 🤖",
        "| Data | @ada |",
        "| Tweets downloaded | 3214 |",
        "| Retweets | 123 |",
        "| Short tweets | 45 |",
        "| Tweets kept | 3046 |",
        "openai\\-community\\/gpt2",
        "| epochs | 4 |",
        "| evaluation | 3.3000 | 27.11 |",
        f"({PICTURE})",
        f"| [\\@ada\\-preprocess]({PREPROCESS_RUN}) | tweets\\-ada | dataset\\-ada |",
        f"| [\\@ada\\-train]({TRAIN_RUN}) | dataset\\-ada, openai\\-community\\/gpt2 | ada |",
        "pipeline('text-generation', model='huggingtweets/ada')",
        'generator("My dream is", num_return_sequences=5)',
        "## Limitations and bias",
        "## About",
        f"({PREPROCESS_RUN})",
        f"({TRAIN_RUN})",
    ):
        assert part in text, part
    assert "CYBORG" not in text and "in the manner of the account above" in text


def test_front_matter_is_what_the_hub_reads() -> None:
    data = front_matter(build_card(ADA))
    assert data == {
        "language": "en",
        "base_model": "openai-community/gpt2",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["huggingtweets"],
        "thumbnail": PICTURE,
        "widget": [{"text": "My dream is"}],
    }


def test_several_accounts_are_a_cyborg_with_a_column_each() -> None:
    text = build_card(dataclasses.replace(ADA, handles=("ada", "bob")))
    assert "🤖 AI CYBORG 🤖" in text and "AI BOT" not in text
    assert "in the manner of the accounts above" in text and "said by the people" in text
    assert "# Ada & bob" in text and "| Data | @ada | @bob |" in text and "| Tweets kept | 3046 | ? |" in text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\n---\nlicense: mit\n# Big", "# a \\-\\-\\- license\\: mit \\# Big"),
        ("<script>alert(1)</script>", "# \\<script\\>alert\\(1\\)\\<\\/script\\>"),
        ("[x](javascript:x) ![y](z) `c` | d", "\\[x\\]\\(javascript\\:x\\) \\!\\[y\\]\\(z\\) \\`c\\` \\| d"),
        ("a\u202eb\x00\x1b[2J\ud800\u200b", "# ab\\[2J\n"),
        ("&lt; \\", "# \\&lt\\; \\\\\n"),
        ("👩\u200d💻 Zoë", "# 👩\u200d💻 Zoë\n"),
        ("\u202e ", "# ada\n"),
        ("\u200d \u200c\ufe0f", "# ada\n"),
    ],
)
def test_names_are_shown_as_they_are_written(name: str, shown: str) -> None:
    text = build_card(dataclasses.replace(ADA, display_names={"ada": name}))
    assert shown in text
    text.encode()
    assert front_matter(text) == front_matter(build_card(ADA))


@pytest.mark.parametrize("value", ["x\n---\nevil: 1", "- [a: b", "'\"", "!!python/object:x"])
def test_front_matter_cannot_be_left(value: str) -> None:
    facts = dataclasses.replace(ADA, base_model=value)
    data = front_matter(build_card(facts))
    assert data["base_model"] == " ".join(value.split())
    assert "evil" not in data and (data["language"], data["thumbnail"]) == ("en", PICTURE)


def test_lineage_of_a_cyborg_names_each_archive_and_an_endless_loss_has_no_perplexity() -> None:
    text = build_card(dataclasses.replace(ADA, handles=("Bob", "ada"), losses={"evaluation": math.inf}))
    assert "| tweets\\-ada, tweets\\-bob |" in text and "| evaluation | inf | ∞ |" in text


def test_model_id_in_the_example_must_be_an_id() -> None:
    with pytest.raises(ModelNotFound):
        build_card(dataclasses.replace(ADA, model_id="x'); import os #"))
