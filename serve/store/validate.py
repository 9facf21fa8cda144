"""Is this folder a GPT-2 that can be served? Checked before it is published, not at each request.

Reads JSON and raw bytes only: no torch, no code of the model's own, nothing is allocated by the folder's word.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from serve.errors import ModelUnusable
from serve.shape import GPT2Shape, canonical_name
from serve.store.safetensors_file import TensorEntry, read_header

WEIGHTS = "model.safetensors"
MAX_JSON_BYTES = 10_000_000  # GPT-2's own tokenizer.json has 2.1 MB

_TOKENIZER_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
# Settings under which transformers would run other code, or compute with other numbers than the weights' own.
_FOREIGN = ("custom_code", "trust_remote_code", "quantization_config")
_FLAGS = ("tie_word_embeddings", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention")
# transformers takes either name, and the right one where both are there; no shape would tell of another `n_head`.
_ALIASES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}
# Of a byte-pair model: "dropout" draws lots, the others change what a token's text is.
_FOREIGN_MERGING = ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
# A float is NaN or infinite when all bits of its exponent are set.
_EXPONENT = {"F32": (np.uint32, 0x7F80_0000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}
_CHUNK_BYTES = 16 * 2**20


def check_folder(folder: Path) -> GPT2Shape:
    """Checks the form of everything a served model needs. Raises: ModelUnusable with what is wrong.

    Opens headers, not weights: milliseconds. The values are `check_finite`'s.
    """
    _refuse_links(folder)
    shape = read_shape(folder)
    tied = read_json(folder / "config.json").get("tie_word_embeddings", True) is not False
    _check_tensors(folder, shape, tied=tied)
    _check_tokenizer(folder, shape)
    return shape


def check_finite(folder: Path) -> None:
    """Reads every weight once. Raises: ModelUnusable naming the first tensor that holds a NaN or an infinity."""
    path = folder / WEIGHTS
    with path.open("rb") as file:
        for entry in read_header(path):
            if canonical_name(entry.name) is None:
                continue  # old causal masks hold -inf where they mean it
            dtype, exponent = _EXPONENT[entry.dtype]
            file.seek(entry.start)
            for chunk in _chunks(file.read, entry):
                bits = np.frombuffer(chunk, dtype=dtype)
                if ((bits & exponent) == exponent).any():
                    raise ModelUnusable(
                        f"Tensor {entry.name!r} holds values that are not finite; the model is damaged or diverged "
                        "in training, and must be made again."
                    )


def read_shape(folder: Path) -> GPT2Shape:
    """What config.json says the model is. Raises: ModelUnusable."""
    config = read_json(folder / "config.json")
    shape = GPT2Shape.from_config(config)
    _check_config(config)
    return shape


def _check_config(config: dict[str, Any]) -> None:
    """What would make transformers compute something else than we do. Raises: ModelUnusable."""
    if foreign := next((key for key in _FOREIGN if config.get(key)), None):
        raise ModelUnusable(f"config.json asks for {foreign!r}; only plain GPT-2 models are served.")
    if flag := next((key for key in _FLAGS if not isinstance(config.get(key, False), bool)), None):
        raise ModelUnusable(f"{flag} in config.json must be true or false.")
    for name, alias in _ALIASES.items():
        if alias in config and config[alias] != config.get(name):
            raise ModelUnusable(
                f"config.json says {alias!r}, and not the same as {name!r}; a GPT-2 says {name!r} alone."
            )
    _check_tokenizer_class(config)


def _check_tokenizer_class(settings: dict[str, Any]) -> None:
    if settings.get("auto_map") or (settings.get("tokenizer_class") or "GPT2Tokenizer") not in _TOKENIZER_CLASSES:
        raise ModelUnusable("The tokenizer is not GPT-2's, or brings its own code; only GPT-2's is served.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder. Raises: ModelUnusable when it is absent, too long, or not an object."""
    return _parse(path.name, _read_small(path))


def _read_small(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelUnusable(f"{path.name} has more than {MAX_JSON_BYTES:,} bytes.")
        return path.read_bytes()
    except FileNotFoundError as exc:
        raise ModelUnusable(f"The model has no {path.name}.") from exc


def _parse(name: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise ModelUnusable(f"{name} is not JSON.") from exc
    if not isinstance(value, dict):
        raise ModelUnusable(f"{name} is not a JSON object.")
    return value


def _refuse_links(folder: Path) -> None:
    # A link would let a folder publish a file from elsewhere, or change after it was checked.
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ModelUnusable(f"{path.name!r} is a link or a special file; a model folder holds plain files only.")


def _check_tensors(folder: Path, shape: GPT2Shape, *, tied: bool) -> None:
    if not (folder / WEIGHTS).is_file():
        raise ModelUnusable(f"The model has no {WEIGHTS}; only safetensors weights are served.")
    missing = shape.tensor_shapes()
    if tied:
        missing.pop("lm_head.weight")
    expected, seen = shape.tensor_shapes(), set()
    for entry in read_header(folder / WEIGHTS):
        name = canonical_name(entry.name)
        if name is None:
            continue
        if name not in expected or name in seen:
            raise ModelUnusable(f"Tensor {entry.name[:60]!r} is not one that this GPT-2 has, or is there twice.")
        if entry.shape != expected[name]:
            raise ModelUnusable(
                f"Tensor {name!r} has shape {list(entry.shape)}; config.json needs {list(expected[name])}."
            )
        if entry.dtype not in _EXPONENT:
            raise ModelUnusable(f"Tensor {name!r} is {entry.dtype}; weights must be F32, F16 or BF16.")
        seen.add(name)
        missing.pop(name, None)
    if missing:
        raise ModelUnusable(f"{len(missing)} tensors are missing, the first is {next(iter(missing))!r}.")


def _check_tokenizer(folder: Path, shape: GPT2Shape) -> None:
    if (folder / "tokenizer_config.json").exists():
        _check_tokenizer_class(read_json(folder / "tokenizer_config.json"))
    highest = _highest_token(tuple((name, _read_small(folder / name)) for name in _vocabulary_files(folder)))
    if highest < 0:
        raise ModelUnusable("The tokenizer has no vocabulary.")
    if highest >= shape.vocab_size:
        raise ModelUnusable(
            f"The tokenizer's highest token is {highest}; the model has only {shape.vocab_size} ('vocab_size')."
        )


def _vocabulary_files(folder: Path) -> list[str]:
    if (folder / "tokenizer.json").exists():
        return ["tokenizer.json"]
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return ["vocab.json", "merges.txt"] + ["added_tokens.json"] * (folder / "added_tokens.json").exists()
    raise ModelUnusable("The model has no tokenizer: neither tokenizer.json nor vocab.json with merges.txt.")


# By content: fine-tunes share GPT-2's own files, whose 50,257 entries take 28 ms to read and 1 ms to compare.
@lru_cache(maxsize=4)
def _highest_token(files: tuple[tuple[str, bytes], ...]) -> int:
    """The highest token number in these files, -1 when there is none. Raises: ModelUnusable."""
    return max((token for name, content in files for token in _token_ids(name, content)), default=-1)


def _token_ids(name: str, content: bytes) -> Iterator[int]:
    if name == "merges.txt":
        return  # pairs of texts; here to be short enough
    table = _parse(name, content)
    if name != "tokenizer.json":
        yield from _ids_of(table)
        return
    model, added = table.get("model"), table.get("added_tokens") or []
    if not isinstance(model, dict) or not _is_byte_level(table, model) or not isinstance(added, list):
        raise ModelUnusable("tokenizer.json is not a byte-pair tokenizer like GPT-2's.")
    yield from _ids_of(model.get("vocab"))
    yield from _ids_of({str(i): token.get("id") if isinstance(token, dict) else None for i, token in enumerate(added)})


def _is_byte_level(table: dict[str, Any], model: dict[str, Any]) -> bool:
    """GPT-2's own steps and no others: one with a pattern of its own could take minutes over a prompt."""
    steps = [table.get("pre_tokenizer"), table.get("decoder")]
    others = [model.get(key) for key in _FOREIGN_MERGING]
    return (
        model.get("type", "BPE") == "BPE"
        and not table.get("normalizer")
        and all(isinstance(step, dict) and step.get("type") == "ByteLevel" for step in steps)
        and not any(others)
    )


def _ids_of(vocabulary: Any) -> Iterator[int]:
    if not isinstance(vocabulary, dict) or not all(type(i) is int and i >= 0 for i in vocabulary.values()):
        raise ModelUnusable("The tokenizer's vocabulary is not a table of token numbers.")
    yield from vocabulary.values()


def _chunks(read: Any, entry: TensorEntry) -> Iterator[bytes]:
    left = entry.end - entry.start
    while left:
        chunk = read(min(left, _CHUNK_BYTES))
        if not chunk:
            raise ModelUnusable("The weights file became shorter while it was checked.")
        left -= len(chunk)
        yield chunk
