"""A tokenizer of GPT-2's size in which each of the 50,257 ids is a piece of text, half of them with a space before.

GPT-2's own merges need not be downloaded for a test of speed, but a server that decodes, and holds text back until a
word is over as transformers' streamer does, must find words. Bytes and pre-tokenization are GPT-2's.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2TokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

END_OF_TEXT = "<|endoftext|>"
NUM_TOKENS = 50_257
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"  # by how often English uses them
SPACE = "Ġ"  # as GPT-2 writes it
# The text of a conversation is what was said, and nothing more: so that a chat server gets the prompt that others get.
PLAIN_CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def merges() -> list[tuple[str, str]]:
    """Two letters, a space and two letters, four letters, a space and four letters."""
    pairs = [(a, b) for a in LETTERS for b in LETTERS]
    joined = ["".join(pair) for pair in pairs]
    num_long = (NUM_TOKENS - 1 - 256 - 2 * len(pairs)) // 2
    common = sorted(range(len(joined)), key=lambda i: sum(divmod(i, len(LETTERS))))[:160]
    fours = [(a, b) for a, b in product([joined[i] for i in common], repeat=2)][:num_long]
    spaced: list[tuple[str, str]] = [(SPACE, word) for word in joined] + [(SPACE, a + b) for a, b in fours]
    return pairs + spaced[: len(joined)] + fours + spaced[len(joined) :]


def vocabulary() -> list[str]:
    """Every token, by its id; the last is the end of text."""
    return [*bytes_to_unicode().values(), *(a + b for a, b in merges()), END_OF_TEXT]


def write_tokenizer(folder: Path) -> None:
    """Into a model's folder, in place of what is there."""
    ids = {token: number for number, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges()))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    fast = GPT2TokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    fast.chat_template = PLAIN_CHAT
    fast.save_pretrained(folder)


def read_words(folder: Path) -> tuple[list[str], list[str]]:
    """The tokens by id and the merges of a folder's tokenizer, merges as "a b"."""
    model = json.loads((folder / "tokenizer.json").read_bytes())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
