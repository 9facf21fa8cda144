"""What bots are judged by: loss on texts, copied words, and whose style a text has. Knows texts and folders alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]
from sklearn.pipeline import make_pipeline, make_union  # type: ignore[import-untyped]
from sklearn.svm import LinearSVC  # type: ignore[import-untyped]
from transformers import GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from serve.training.finetune import encode, end_of_text_id, load_tokenizer

# --- Shares -------------------------------------------------------------------------------------------------

_Z = 1.959964  # 95 %, two-sided


@dataclass(frozen=True, slots=True)
class Share:
    """`count` of `total`, with the 95 % interval of Wilson, which holds for small counts and near 0 and 1."""

    count: int
    total: int

    @property
    def value(self) -> float:
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927."""
        if not self.total:
            return 0.0, 1.0
        n, p, z = self.total, self.value, _Z
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(centre - reach, 0.0), min(centre + reach, 1.0)

    def as_json(self) -> dict[str, Any]:
        low, high = self.interval
        value = round(self.value, 4) if self.total else None
        return {"share": value, "low": round(low, 4), "high": round(high, 4), "of": self.total}


# --- Loss ---------------------------------------------------------------------------------------------------

_BATCH_TOKENS = 2_048


@dataclass(frozen=True, slots=True)
class Text:
    """A text as the model reads it: after <|endoftext|> and, where it fits the context, with one at its end."""

    ids: tuple[int, ...]
    num_bytes: int  # of UTF-8 that are predicted; the end counts as one

    @property
    def num_tokens(self) -> int:
        return len(self.ids) - 1


def read_texts(folder: Path, texts: Sequence[str], context: int) -> list[Text]:
    """What does not fit is cut off, and nothing put in its place."""
    tokenizer = load_tokenizer(folder)
    end = end_of_text_id(tokenizer)
    found = []
    for ids in encode(tokenizer, texts):
        kept = [end, *ids, end][: context + 1]
        # In a byte-level vocabulary a token has one character for each of its bytes.
        sizes = [1 if token == end else len(tokenizer.id_to_token(token) or "") for token in kept[1:]]
        found.append(Text(tuple(kept), sum(sizes)))
    return found


class Reader:
    """A model of a folder, in float32, that tells how well it foresees texts."""

    def __init__(self, folder: Path) -> None:
        transformers_logging.disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(device)
        self._model.eval()
        self.context: int = self._model.config.n_positions

    @torch.inference_mode()
    def nats(self, texts: Sequence[Text]) -> NDArray[np.float64]:
        """Of each text, in all of its tokens."""
        found = np.zeros(len(texts))
        order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
        while order:
            width = len(texts[order[-1]].ids) - 1
            size = max(_BATCH_TOKENS // width, 1)
            batch, order = order[-size:], order[:-size]
            ids = torch.zeros(len(batch), width + 1, dtype=torch.long)
            targets = torch.full((len(batch), width), -100)
            for row, i in enumerate(batch):
                text = torch.tensor(texts[i].ids)
                ids[row, : len(text)] = text
                targets[row, : len(text) - 1] = text[1:]
            logits = self._model(input_ids=ids[:, :-1].to(self._model.device), use_cache=False).logits  # (B, T, V)
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten().to(logits.device), reduction="none", ignore_index=-100
            )  # (B * T)
            found[batch] = losses.view(targets.shape).double().sum(1).cpu().numpy()
        return found


# --- Copies -------------------------------------------------------------------------------------------------


class Copies:
    """Finds the longest run of words that a text shares with any one of `originals`.

    Words are what white space separates, case-folded, punctuation and all: "end." is not "end".
    """

    def __init__(self, originals: Sequence[str]) -> None:
        places: dict[str, list[int]] = {}
        at = 0
        for text in originals:
            for word in words(text):
                places.setdefault(word, []).append(at)
                at += 1
            at += 1  # an empty place, so that no run goes on from one text to the next
        self._places = {word: np.array(found) for word, found in places.items()}
        self._whole = {tuple(words(text)) for text in originals}
        self._lengths = np.zeros(at + 1, dtype=np.int64)  # of the run that ends just before each place

    def longest_run(self, text: str) -> int:
        """In words; exact."""
        nowhere = np.array([], dtype=np.int64)
        lengths, ends, best = self._lengths, nowhere, 0
        for word in words(text):
            found = self._places.get(word, nowhere)
            grown = lengths[found] + 1
            lengths[ends] = 0
            ends = found + 1
            lengths[ends] = grown
            best = max(best, int(grown.max(initial=0)))
        lengths[ends] = 0
        return best

    def is_whole(self, text: str) -> bool:
        """Whether the text, word by word, is one of the originals."""
        return tuple(words(text)) in self._whole


def words(text: str) -> list[str]:
    return text.casefold().split()


_SHINGLE = 8  # characters: some two words, and a clause of Japanese
_NEAR = 0.5


def are_near_duplicates(texts: Sequence[str], originals: Sequence[str]) -> list[bool]:
    """For each text, whether half of its runs of 8 characters (case aside) are in one and the same original."""
    homes: dict[str, list[int]] = {}
    for number, original in enumerate(originals):
        for shingle in _shingles(original):
            homes.setdefault(shingle, []).append(number)
    found = []
    for text in texts:
        shingles = _shingles(text)
        shared = Counter(number for shingle in shingles for number in homes.get(shingle, ()))
        found.append(max(shared.values(), default=0) >= _NEAR * len(shingles))
    return found


def _shingles(text: str) -> set[str]:
    plain = " ".join(words(text))
    return {plain[i : i + _SHINGLE] for i in range(max(len(plain) - _SHINGLE + 1, 1))}


# --- Style --------------------------------------------------------------------------------------------------

_NAME_OR_TAG = re.compile(r"([@#])\w+")


class StyleJudge:
    """Says whose a text is: a linear SVM over words, pairs of words, and 2 to 5 characters of words.

    Learns from real texts alone; `strangers`, if there are any, are texts of other people, so that it can also say:
    nobody's. Names and tags are reduced to `@` and `#`, since one account's own would give it away without any style.
    People count the same, however much each wrote.
    """

    def __init__(self, texts_by_handle: Mapping[str, Sequence[str]], strangers: Sequence[str], seed: int) -> None:
        self.handles = list(texts_by_handle)
        features = make_union(
            TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"\w+|[^\w\s]"),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True, max_features=300_000),
        )
        self._pipeline = make_pipeline(features, LinearSVC(class_weight="balanced", random_state=seed))
        labelled = [(handle, text) for handle, texts in texts_by_handle.items() for text in texts]
        labelled += [(_NOBODY, text) for text in strangers]
        self._pipeline.fit([_anonymous(text) for _, text in labelled], [handle for handle, _ in labelled])

    def shares(self, texts: Sequence[str]) -> dict[str, Share]:
        """Handle -> the share of `texts` that is held to be this person's; the rest is nobody's."""
        named = Counter(self._pipeline.predict([_anonymous(text) for text in texts]) if texts else [])
        return {handle: Share(named[handle], len(texts)) for handle in self.handles}


_NOBODY = ""


def _anonymous(text: str) -> str:
    return _NAME_OR_TAG.sub(r"\1", text)
