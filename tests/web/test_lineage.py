"""The drawing of how a bot came to be."""

from __future__ import annotations

import pytest
from selectolax.lexbor import LexborHTMLParser

from serve.types import Artifact, ModelInfo, Run
from serve.web.lineage import Lineage, draw, lineage_of


def runs(*handles: str, name: str = "ada", base: str = "fledgling") -> tuple[Run, Run]:
    raw = tuple(Artifact("raw-dataset", f"tweets-{handle}", "aa11bb22cc") for handle in handles)
    dataset = Artifact("train-dataset", f"dataset-{name}", "dd33", 1)
    used = (dataset, Artifact("pretrained-model", base, "ee44"))
    made = (Artifact("finetuned-model", name, "ff55", 2),)
    return (
        Run("ftjob-0", "preprocess", f"@{name}-preprocess", 1, 2, inputs=raw, outputs=(dataset,)),
        Run("ftjob-0", "train", f"@{name}-train", 2, 3, inputs=used, outputs=made),
    )


def info(**facts: object) -> ModelInfo:
    return ModelInfo("huggingtweets/ada", "abc123def456", 1, 10, "huggingtweets", **facts)  # type: ignore[arg-type]


def drawn(lineage: Lineage | None) -> LexborHTMLParser:
    assert lineage is not None
    return LexborHTMLParser(draw(lineage))


def test_it_shows_what_was_recorded_with_versions_and_digests() -> None:
    svg = drawn(lineage_of(info(), runs("ada")))
    assert [node.text() for node in svg.css("svg title")] == [
        *("tweets-ada", "@ada-preprocess", "dataset-ada", "fledgling", "@ada-train", "ada"),
    ]
    said = [node.text() for node in svg.css("text")]
    assert {"raw-dataset", "v0 · aa11bb22", "v1 · dd33", "v2 · ff55", "pretrained-model", "run"} <= set(said)
    assert len(svg.css("rect.run")) == 2 and len(svg.css("rect.box")) == 4
    assert len(svg.css("path.arrow")) == 5


def test_a_cyborg_has_an_arrow_from_each_archive() -> None:
    svg = drawn(lineage_of(info(), runs("ada", "bob", "cleo")))
    assert len(svg.css("rect")) == 8 and len(svg.css("path.arrow")) == 7


def test_it_says_in_words_what_it_draws() -> None:
    picture = drawn(lineage_of(info(), runs("ada", "bob"))).css_first("svg")
    assert picture is not None and picture.attributes["role"] == "img"
    assert picture.attributes["aria-label"] == (
        "From tweets-ada and tweets-bob the run @ada-preprocess made the data set dataset-ada; from that and the model "
        "fledgling the run @ada-train made the model ada."
    )


def test_without_records_the_model_tells_of_itself() -> None:
    lineage = lineage_of(info(handles=("Bob", "Ada"), base_model="gpt2"), ())
    assert lineage is not None
    assert [box.name for box in lineage.raw] == ["tweets-ada", "tweets-bob"]
    assert (lineage.base.name, lineage.model.detail) == ("gpt2", "abc123de")


@pytest.mark.parametrize("facts", [{}, {"handles": ("ada",)}, {"base_model": "gpt2"}])
def test_a_model_that_is_no_bot_has_none(facts: dict[str, object]) -> None:
    assert lineage_of(info(**facts), ()) is None


def test_everything_lies_inside_the_picture() -> None:
    svg = drawn(lineage_of(info(), runs(*"abcdefgh")))
    picture = svg.css_first("svg")
    assert picture is not None
    width, height = (float(picture.attributes[name] or 0) for name in ("width", "height"))
    for box in svg.css("rect"):
        x, y, w, h = (float(box.attributes[name] or 0) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width and 0 <= y <= y + h <= height


def test_long_and_hostile_names_stay_in_their_boxes() -> None:
    name = '"><script>alert(1)</script>' * 3
    svg = drawn(lineage_of(info(), runs("ada", name=name, base=name)))
    assert not svg.css("script")
    assert max(len(node.text()) for node in svg.css("text")) <= 25
    assert f"dataset-{name}" in [node.text() for node in svg.css("svg title")]
