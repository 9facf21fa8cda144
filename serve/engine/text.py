"""From token ids to text as it grows: characters that span tokens, stop strings that span tokens.

Knows byte-level BPE (GPT-2's): every token is a run of bytes, so decoding is joining bytes.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from weakref import WeakValueDictionary

from tokenizers import ByteLevelBPETokenizer, Tokenizer

from serve.errors import ModelUnusable

END_OF_TEXT = "<|endoftext|>"


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-in characters -> the bytes they stand for (Source: `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


class Vocabulary:
    """One tokenizer, shared by all models whose tokenizer files are the same. Safe to use from threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        # A prompt is text: "<|endoftext|>" typed by a user is fourteen characters, not the end of a text.
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        eos = tokenizer.token_to_id(END_OF_TEXT)
        if eos is None:
            raise ModelUnusable(f"The tokenizer has no {END_OF_TEXT} token; a GPT-2 tokenizer has.")
        self.eos_id: int = eos
        special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special} | {eos}
        stand_ins = _byte_of_character()
        self._bytes: list[bytes] = [b""] * (max(tokenizer.get_vocab().values()) + 1)
        for token, index in tokenizer.get_vocab().items():
            known = index not in special and all(c in stand_ins for c in token)
            self._bytes[index] = bytes(stand_ins[c] for c in token) if known else token.encode()
        self.special_ids = frozenset(special)

    def __len__(self) -> int:
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens in it count as plain text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to the text: none for special tokens and for ids the tokenizer lacks."""
        if token_id in self.special_ids or token_id >= len(self._bytes):
            return b""
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """A token by itself, for lists of tokens; parts of characters show as U+FFFD."""
        if token_id >= len(self._bytes):
            return ""
        return self._bytes[token_id].decode("utf-8", "replace")

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids` without special tokens."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")


class Vocabularies:
    """Loads each distinct tokenizer once: GPT-2's takes 50,000 entries, and all its fine-tunes share it."""

    def __init__(self) -> None:
        # Weak: who holds a model's facts owns its vocabulary, so that odd tokenizers do not pile up.
        self._by_hash: WeakValueDictionary[str, Vocabulary] = WeakValueDictionary()
        self._lock = threading.Lock()

    def load(self, folder: Path) -> Vocabulary:
        """The vocabulary of a model folder. Raises: ModelUnusable."""
        names = ["tokenizer.json"] if (folder / "tokenizer.json").exists() else ["vocab.json", "merges.txt"]
        try:
            digest = hashlib.sha256(b"\0".join((folder / name).read_bytes() for name in names)).hexdigest()
        except OSError as exc:
            raise ModelUnusable("The model folder has no tokenizer: expected tokenizer.json, or vocab.json and "
                                "merges.txt.") from exc  # fmt: skip
        with self._lock:
            vocabulary = self._by_hash.get(digest)
            if vocabulary is None:
                vocabulary = self._by_hash[digest] = Vocabulary(_read_tokenizer(folder, names))
            return vocabulary


def _read_tokenizer(folder: Path, names: list[str]) -> Tokenizer:
    try:
        if names == ["tokenizer.json"]:
            if json.loads((folder / names[0]).read_bytes())["model"]["type"] != "BPE":
                raise ModelUnusable("tokenizer.json is not a byte-pair encoding; GPT-2 models use one.")
            return Tokenizer.from_file(str(folder / names[0]))
        tokenizer = ByteLevelBPETokenizer(*(str(folder / name) for name in names))
        tokenizer.add_special_tokens([END_OF_TEXT])
        inner: Tokenizer = tokenizer._tokenizer
        return inner
    except ModelUnusable:
        raise
    except Exception as exc:  # tokenizers raises bare Exception for damaged files
        raise ModelUnusable("The tokenizer files of the model are damaged.") from exc


class TextStream:
    """The text of one sequence as tokens come.

    What `push` returns never ends inside a character and never holds the beginning of a stop string that
    may yet complete. After a stop string was found, `stopped` is True and the text ended before it.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str] = ()) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that became certain with this token."""
        return self._release(self._decoder.decode(self._vocabulary.token_bytes(token_id)))

    def finish(self) -> str:
        """What is still held when the sequence ends for another reason."""
        text = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, fresh: str) -> str:
        if not self._stop:
            return fresh
        if self.stopped:
            return ""
        text = self._held + fresh
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
