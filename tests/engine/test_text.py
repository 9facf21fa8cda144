"""Text that grows token by token says the same as the whole, and stop strings are never shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from serve.engine.text import TextStream, Vocabularies, Vocabulary
from serve.errors import ModelUnusable
from tests.fakes.models import write_tiny_gpt2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gpt2(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def vocabulary(folder: Path) -> Vocabulary:
    return Vocabularies().load(folder)


@given(st.lists(st.integers(0, 520), max_size=60))
def test_streamed_text_is_the_decoded_whole(ids: list[int]) -> None:
    vocabulary = _shared()
    stream = TextStream(vocabulary)
    assert "".join(map(stream.push, ids)) + stream.finish() == vocabulary.decode(ids)


@given(st.text())
def test_text_survives_encoding_and_decoding(text: str) -> None:
    vocabulary = _shared()
    if not any(0xD800 <= ord(c) <= 0xDFFF for c in text):
        assert vocabulary.decode(vocabulary.encode(text)) == text


def test_ids_and_text_are_those_of_transformers(folder: Path, vocabulary: Vocabulary) -> None:
    reference = AutoTokenizer.from_pretrained(folder)
    for text in ("My dream is to build a house", "Grüße 👋🏽 aus 東京", " leading and  double  spaces\n"):
        ids = reference(text, add_special_tokens=False).input_ids
        assert vocabulary.encode(text) == ids
        assert vocabulary.decode(ids) == reference.decode(ids, clean_up_tokenization_spaces=False)


def test_special_tokens_in_a_prompt_are_plain_text(vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode("a<|endoftext|>b")
    assert vocabulary.eos_id not in ids
    assert vocabulary.decode(ids) == "a<|endoftext|>b"


@given(st.text("ab\n", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_cut_where_the_first_of_them_begins(text: str, stop: list[str]) -> None:
    vocabulary = _shared()
    stream = TextStream(vocabulary, stop)
    seen = ""
    for token in vocabulary.encode(text):
        seen += stream.push(token)
        assert not any(s in seen for s in stop)
        if stream.stopped:
            break
    else:
        seen += stream.finish()
    # Stop strings are looked for token by token: the cut is at the first one complete after some token.
    assert text.startswith(seen)
    assert stream.stopped == any(s in text for s in stop)
    assert not any(s in seen for s in stop)


def test_a_damaged_tokenizer_is_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(ModelUnusable, match="no tokenizer"):
        Vocabularies().load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(ModelUnusable, match="damaged"):
        Vocabularies().load(tmp_path)


def test_models_with_the_same_tokenizer_share_one_vocabulary(tmp_path: Path) -> None:
    vocabularies = Vocabularies()
    first = vocabularies.load(write_tiny_gpt2(tmp_path / "a", seed=1))
    assert vocabularies.load(write_tiny_gpt2(tmp_path / "b", seed=2)) is first


_CACHE: list[Vocabulary] = []


def _shared() -> Vocabulary:
    """Hypothesis examples cannot use function fixtures; one vocabulary serves them all."""
    if not _CACHE:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            _CACHE.append(Vocabularies().load(write_tiny_gpt2(Path(folder))))
    return _CACHE[0]
