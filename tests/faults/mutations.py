"""Model folders as the Hub has them, small, and what can happen to their bytes: by accident, or by intent."""

from __future__ import annotations

import io
import json
import random
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from tests.fakes.models import write_tiny_gpt2
from tests.faults.payloads import payloads, with_table

Files = dict[str, bytes]
SHAPE: dict[str, Any] = {"n_layer": 2, "n_embd": 16, "n_positions": 16}

# --- The folders, before -------------------------------------------------------------------------------------


def originals() -> dict[str, Files]:
    """Kind of checkpoint -> its files."""
    modern = {kind: _folder(dtype=dtype) for kind, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16))}
    return {
        "safetensors": modern["f32"],
        "safetensors bf16": modern["bf16"],
        "safetensors untied": _folder(tie=False),
        "safetensors shards": _sharded(modern["f32"], "model", "safetensors"),
        "bin": _as_bin(modern["f32"]),
        "bin fp16": _as_bin(_folder(dtype=torch.float16)),
        "bin legacy": _as_bin(modern["f32"], zipped=False),
        "bin shards": _sharded(modern["f32"], "pytorch_model", "bin"),
    }


def _folder(**changes: Any) -> Files:
    with tempfile.TemporaryDirectory() as name:
        folder = write_tiny_gpt2(Path(name), seed=1, **SHAPE, **changes)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _weights(files: Files) -> dict[str, torch.Tensor]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(files["model.safetensors"])
        file.flush()
        weights: dict[str, torch.Tensor] = load_file(file.name)
    return weights


def _as_bin(files: Files, *, zipped: bool = True) -> Files:
    """As 2021 had it: a tied output layer, masks in each layer, and no tokenizer.json."""
    state = _weights(files)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    for layer in range(SHAPE["n_layer"]):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8).tril()
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    kept = {name: content for name, content in files.items() if name not in ("model.safetensors", "tokenizer.json")}
    return kept | {"pytorch_model.bin": _saved(state, zipped=zipped)}


def _sharded(files: Files, stem: str, suffix: str) -> Files:
    weights = _weights(files)
    parts: Files = {}
    index: dict[str, str] = {}
    for number, names in enumerate((list(weights)[::2], list(weights)[1::2]), start=1):
        shard = f"{stem}-{number:05}-of-00002.{suffix}"
        chosen = {name: weights[name] for name in names}
        parts[shard] = save(chosen, metadata={"format": "pt"}) if suffix == "safetensors" else _saved(chosen)
        index |= dict.fromkeys(names, shard)
    kept = {name: content for name, content in files.items() if name != "model.safetensors"}
    return kept | parts | {f"{stem}.{suffix}.index.json": json.dumps({"metadata": {}, "weight_map": index}).encode()}


def _saved(state: Any, *, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


# --- One change ----------------------------------------------------------------------------------------------


def mutate(files: Files, rng: random.Random, harm: Path) -> tuple[Files, str]:
    """A copy of the files with one of them changed, and what was done."""
    name = _choose_file(list(files), rng)
    ways = [_flip, _flip_edges, _overwrite, _truncate, _remove, _repeat, _swap, _splice, _blank, _values]
    ways += [_edit_header] * 8 if name.endswith(".safetensors") else []
    ways += [_edit_archive] * 6 if name.endswith(".bin") and files[name].startswith(b"PK") else []
    ways += [_edit_pickle, _edit_pickle] if name.endswith(".bin") else []
    ways += [_edit_json] * 12 if name.endswith(".json") else []
    way = rng.choice(ways)
    if name.endswith(".bin") and rng.random() < 0.06:
        return files | {name: _payload(files[name], rng, harm)}, f"{name}: payload"
    return files | {name: way(files[name], rng)}, f"{name}: {way.__name__.strip('_')}"


def _choose_file(names: list[str], rng: random.Random) -> str:
    weights = [name for name in names if name.endswith((".bin", ".safetensors"))]
    others = [name for name in names if name not in weights and name != "generation_config.json"]
    return rng.choice(weights if rng.random() < 0.65 else others)


def _place(content: bytes, rng: random.Random) -> int:
    """Anywhere, but more often where the structure is: at the beginning or the end."""
    size = max(1, len(content))
    return rng.choice([rng.randrange(size), rng.randrange(min(size, 4096)), size - 1 - rng.randrange(min(size, 2048))])


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        changed[_place(content, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _flip_edges(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(min(len(changed), 200))] = rng.choice([0, 0xFF, 0x7F, 0x80, rng.randrange(256)])
    return bytes(changed)


def _overwrite(content: bytes, rng: random.Random) -> bytes:
    start, length = _place(content, rng), rng.choice([1, 4, 8, 64, 1024])
    return content[:start] + rng.randbytes(length) + content[start + length :]


def _truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: _place(content, rng)]


def _remove(content: bytes, rng: random.Random) -> bytes:
    start = _place(content, rng)
    return content[:start] + content[start + rng.choice([1, 2, 8, 64, 512]) :]


def _repeat(content: bytes, rng: random.Random) -> bytes:
    start = _place(content, rng)
    end = start + rng.choice([1, 8, 64, 512])
    return content[:end] + content[start:end] * rng.choice([1, 2, 16]) + content[end:]


def _swap(content: bytes, rng: random.Random) -> bytes:
    length = rng.choice([4, 32, 256])
    one, other = sorted(_place(content, rng) for _ in range(2))
    if other - one < length:
        return _flip(content, rng)
    middle, end = content[one + length : other], content[other + length :]
    return content[:one] + content[other : other + length] + middle + content[one : one + length] + end


def _splice(content: bytes, rng: random.Random) -> bytes:
    """Its beginning, and its end from somewhere else."""
    return content[: _place(content, rng)] + content[_place(content, rng) :]


def _blank(content: bytes, rng: random.Random) -> bytes:
    start, length = _place(content, rng), rng.choice([4, 512, 4096])
    return content[:start] + bytes(length) + content[start + length :]


def _values(content: bytes, rng: random.Random) -> bytes:
    """NaN, infinities and the like, as 16- and 32-bit floats would have them, among the weights."""
    start = (len(content) // 3 + rng.randrange(max(1, len(content) // 2))) & ~3
    words = [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\0\x7c\0\x7c", b"\xff\xff\xff\xff", b"\1\0\0\0"]
    return content[:start] + rng.choice(words) + content[start + 4 :]


# --- Changes that keep the form ------------------------------------------------------------------------------


def _edit_header(content: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    table, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = [name for name in table if name != "__metadata__"]
    name, other = rng.sample(names, 2)
    entry = table[name]
    extra = b""
    match rng.randrange(14):
        case 0:
            entry["shape"] = rng.choice([entry["shape"][::-1], [2**62, 4], [-1], [], [0], [*entry["shape"], 1], "16"])
        case 1:
            entry["data_offsets"][rng.randrange(2)] += rng.choice([-4, 4, 1, 2**63, -(2**63)])
        case 2:
            entry["dtype"] = rng.choice(["F64", "F16", "BF16", "I32", "F8_E4M3", "BOOL", "X", 3, None])
        case 3:
            table[rng.choice(["transformer.h.9.attn.bias", "évil", "lm_head.weight", "x" * 5000])] = table.pop(name)
        case 4:
            table.pop(name)
        case 5:
            entry["data_offsets"], table[other]["data_offsets"] = table[other]["data_offsets"], entry["data_offsets"]
        case 6:
            table["__metadata__"] = rng.choice([None, [], {"a": 1}, {"format": "tf"}, {"format": "pt", "x": "y" * 999}])
        case 7:
            table[name], table[other] = table[other], table[name]  # the names of two change places
        case 8:
            table[rng.choice(names) + ".attn.bias"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        case 9:
            extra = rng.randbytes(rng.choice([1, 8, 100]))
        case 10:
            length += rng.choice([1, -1, 8, 2**32, 2**62])
            return struct.pack("<Q", length % 2**64) + content[8:]
        case 11:
            table |= {f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(3000)}
        case 12:
            text = json.dumps(table).replace("}", "," + json.dumps(name) + ":" + json.dumps(table[other]) + "}", 1)
            return struct.pack("<Q", len(text)) + text.encode() + data
        case 13:
            text = json.dumps(table) + rng.choice([" " * 100, "\n", "\0", "{}", ","])
            return struct.pack("<Q", len(text)) + text.encode() + data
    text = json.dumps(table, ensure_ascii=rng.random() < 0.5)
    return struct.pack("<Q", len(text.encode())) + text.encode() + data + extra


def _edit_archive(content: bytes, rng: random.Random) -> bytes:
    """Written anew, its checksums right, with one part changed."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(target, "w") as new:
        parts = {part.filename: old.read(part) for part in old.infolist()}
        name = rng.choice(list(parts))
        way = rng.randrange(8)
        if way == 0:
            parts.pop(name)
        elif way == 1 and parts[name]:
            parts[name] = rng.choice([_flip, _truncate, _overwrite, _values, _repeat])(parts[name], rng)
        elif way == 2:
            parts[rng.choice(["../../evil", "/etc/evil", "archive/data/0", "x" * 300])] = parts.pop(name)
        elif way == 3:
            parts = {key: b"big" if key.endswith("byteorder") else value for key, value in parts.items()}
        elif way == 4:
            table = next(key for key in parts if key.endswith("/data.pkl"))
            parts[table] = rng.choice([_flip, _overwrite, _swap, _repeat])(parts[table], rng)
        elif way == 5:
            parts["archive/constants.pkl"] = b"\x80\x02)."  # the mark of a TorchScript program
        compression = zipfile.ZIP_DEFLATED if way == 6 else zipfile.ZIP_STORED
        for key, value in parts.items():
            new.writestr(key, value, compress_type=compression)
            if way == 7 and key == name:
                new.fp.write(b"between the parts")  # type: ignore[union-attr]
    return target.getvalue()


def _edit_pickle(content: bytes, rng: random.Random) -> bytes:
    """One of the small words of a table of tensors exchanged for another: a number, a type, a name."""
    words = [b"FloatStorage", b"HalfStorage", b"_rebuild_tensor_v2", b"storage", b"cpu", b"OrderedDict", b"torch"]
    words += [b"K\x10", b"K\x01", b"K\x30", b"M\x00\x02", b"\x85", b"\x86", b"transformer.h.0.", b"ln_1", b"weight"]
    found = [word for word in words if word in content]
    word = rng.choice(found or [content[:1]])
    places = content.count(word)
    start = -1
    for _ in range(rng.randrange(places) + 1 if places else 1):
        start = content.find(word, start + 1)
    others = [b"DoubleStorage", b"HalfStorage", b"LongStorage", b"_rebuild_tensor", b"_rebuild_qtensor", b"meta", b"os"]
    others += [b"K\x00", b"K\xff", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"\x87", b"ln_2", b"bias", word[::-1]]
    return content[:start] + rng.choice(others) + content[start + len(word) :]


def _payload(content: bytes, rng: random.Random, harm: Path) -> bytes:
    bait = rng.choice(list(payloads(harm).values()))
    if content.startswith(b"PK") and rng.random() < 0.5:
        with zipfile.ZipFile(io.BytesIO(_saved({"x": bait}))) as archive:
            return with_table(content, archive.read("archive/data.pkl"))
    return _saved({"transformer.wte.weight": bait}, zipped=rng.random() < 0.5)


_ODD: list[Callable[[random.Random], Any]] = [
    lambda rng: rng.choice([0, -1, 1, 2, 3, 16, 17, 511, 513, 2**31, 2**63, 2**64, 10**40, 1e308, -0.0, 0.5]),
    lambda rng: rng.choice([None, True, False, "", "1", "é\ud800", "x" * 3000, float("nan"), float("inf")]),
    lambda rng: rng.choice([[], {}, [[]], {"a": {}}, [1, 2], ["x"] * 50]),
    lambda rng: rng.choice(["gpt2", "llama", "gelu", "gelu_new", "relu", "ByteLevel", "BPE", "<|endoftext|>"]),
]
_KEYS = ["auto_map", "custom_code", "quantization_config", "num_attention_heads", "hidden_size", "n_inner", "dtype"]
_KEYS += ["tie_word_embeddings", "scale_attn_weights", "add_cross_attention", "tokenizer_class", "normalizer", "type"]


def _edit_json(content: bytes, rng: random.Random) -> bytes:
    """One value somewhere exchanged, taken away or added."""
    value = json.loads(content)
    at = value
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = rng.choice(keys) if keys else None
        inner = at[key] if key is not None else None
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.15:
            break
        at = inner
    odd = rng.choice(_ODD)(rng)
    way = rng.random()
    if isinstance(at, dict) and (key is None or way < 0.2):
        at[rng.choice(_KEYS)] = odd
    elif key is None or (isinstance(at, list) and way < 0.2):
        at.append(odd)
    elif way < 0.4:
        del at[key]
    else:
        at[key] = odd
    return json.dumps(value).encode()
