"""A Hugging Face GPT-2 folder as a GGUF file, llama.cpp's format: bf16 or Q8_0 matrices, float32 vectors.

Source: llama.cpp, gguf-py/gguf/constants.py (types, names), conversion/gpt2.py (matrices are transposed),
ggml/src/ggml-quants.c (Q8_0). A tokenizer with fewer tokens than the model gets a stand-in: who converts such a model
sends and counts token ids.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from loadtest.tokenizer import END_OF_TEXT, read_words

ALIGNMENT = 32
U32, I32, F32, STRING, ARRAY = 4, 5, 6, 8, 9  # of metadata values
TENSOR_F32, TENSOR_Q8_0, TENSOR_BF16 = 0, 8, 30
FILE_TYPE = {"bf16": 32, "q8_0": 7}
BLOCK = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
WHOLE = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}


def convert(folder: Path, path: Path, kind: str) -> None:
    """Write `folder`'s model to `path`, its matrices as `kind`: "bf16" or "q8_0"."""
    config = json.loads((folder / "config.json").read_text())
    tensors = list(_tensors(folder / "model.safetensors", kind))
    metadata = list(_metadata(config, kind, *_vocabulary(folder, config["vocab_size"])))
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, value_type, value in metadata:
            file.write(_string(key) + struct.pack("<I", value_type) + value)
        offset = 0
        for name, shape, tensor_type, data in tensors:
            dimensions = shape[::-1]  # innermost first
            file.write(_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *dimensions))
            file.write(struct.pack("<IQ", tensor_type, offset))
            offset += -(-data.nbytes // ALIGNMENT) * ALIGNMENT
        for _, _, _, data in tensors:
            _align(file)
            file.write(data.tobytes())
        _align(file)


def _align(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _tensors(path: Path, kind: str) -> Iterator[tuple[str, tuple[int, ...], int, np.ndarray[Any, Any]]]:
    for name, tensor in load_file(path).items():
        stem, _, what = name.removeprefix("transformer.").rpartition(".")
        if stem == "lm_head":  # tied: llama.cpp takes the embedding
            continue
        if stem.startswith("h."):
            _, layer, part = stem.split(".", 2)
            new_name = f"blk.{layer}.{BLOCK[part]}.{what}"
            tensor = tensor.t().contiguous() if tensor.dim() == 2 else tensor
        else:
            new_name = f"{WHOLE[stem]}.{what}"
        yield new_name, tuple(tensor.shape), *_encode(tensor, "f32" if tensor.dim() == 1 or stem == "wpe" else kind)


def _encode(tensor: Tensor, kind: str) -> tuple[int, np.ndarray[Any, Any]]:
    if kind == "f32":
        return TENSOR_F32, tensor.float().numpy()
    if kind == "bf16":
        return TENSOR_BF16, tensor.to(torch.bfloat16).view(torch.int16).numpy()
    blocks = tensor.float().reshape(-1, 32)
    scales = blocks.abs().amax(1, keepdim=True) / 127
    quants = torch.where(scales > 0, blocks / scales, 0).round().to(torch.int8)
    rows = torch.cat([scales.half().view(torch.int8), quants], 1)
    return TENSOR_Q8_0, rows.numpy()


def _vocabulary(folder: Path, size: int) -> tuple[list[str], list[str]]:
    """Tokens and merges."""
    tokens, merges = read_words(folder)
    if len(tokens) == size:
        return tokens, merges
    last = size - 1
    tokens = [f"t{i}" for i in range(last)] + [END_OF_TEXT]
    tokens[:256] = [chr(256 + i) for i in range(256)]
    return tokens, ["t 1"]


def _metadata(
    config: dict[str, Any], kind: str, tokens: list[str], merges: list[str]
) -> Iterator[tuple[str, int, bytes]]:
    sizes = {
        "context_length": config["n_positions"],
        "embedding_length": config["n_embd"],
        "feed_forward_length": config.get("n_inner") or 4 * config["n_embd"],
        "block_count": config["n_layer"],
        "attention.head_count": config["n_head"],
    }
    yield "general.architecture", STRING, _string("gpt2")
    yield "general.file_type", U32, struct.pack("<I", FILE_TYPE[kind])
    for name, size in sizes.items():
        yield f"gpt2.{name}", U32, struct.pack("<I", size)
    yield "gpt2.attention.layer_norm_epsilon", F32, struct.pack("<f", config["layer_norm_epsilon"])
    last = config["vocab_size"] - 1
    kinds = [1] * last + [3]  # normal, control
    yield "tokenizer.ggml.model", STRING, _string("gpt2")
    yield "tokenizer.ggml.pre", STRING, _string("gpt-2")
    yield "tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, len(tokens)) + b"".join(map(_string, tokens))
    yield "tokenizer.ggml.token_type", ARRAY, struct.pack(f"<IQ{len(kinds)}i", I32, len(kinds), *kinds)
    yield "tokenizer.ggml.merges", ARRAY, struct.pack("<IQ", STRING, len(merges)) + b"".join(map(_string, merges))
    yield "tokenizer.ggml.bos_token_id", U32, struct.pack("<I", last)
    yield "tokenizer.ggml.eos_token_id", U32, struct.pack("<I", last)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
