"""A folder that passes can be served; every way to be wrong is refused with a sentence."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.errors import ModelUnusable
from serve.store.safetensors_file import encode_header, read_header
from serve.store.validate import check_finite, check_folder
from tests.fakes.models import write_tiny_gpt2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_gpt2(tmp_path / "model")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tie", [True, False])
def test_plain_gpt2_passes(tmp_path: Path, dtype: torch.dtype, tie: bool) -> None:
    folder = write_tiny_gpt2(tmp_path, dtype=dtype, tie=tie)
    assert check_folder(folder).vocab_size == 512
    check_finite(folder)


def test_names_without_prefix_and_old_masks_pass(folder: Path) -> None:
    def age(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
        tensors["h.0.attn.masked_bias"] = torch.tensor(-torch.inf)

    edit_tensors(folder, age)
    check_folder(folder)
    check_finite(folder)


def test_vocabulary_and_merges_do_without_tokenizer_json(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    check_folder(folder)
    (folder / "merges.txt").unlink()
    with pytest.raises(ModelUnusable, match="no tokenizer"):
        check_folder(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("transformer.ln_f.bias"), "missing"),
        (lambda t: t.update(surprise=torch.zeros(1)), "not one that this GPT-2 has"),
        (lambda t: t.update({"wte.weight": torch.zeros(512, 32)}), "twice"),
        (lambda t: t.update({"transformer.ln_f.bias": torch.zeros(31)}), r"\[31\]"),
        (lambda t: t.update({"transformer.ln_f.bias": torch.zeros(32, dtype=torch.float64)}), "F64"),
    ],
)
def test_wrong_tensors_are_refused(folder: Path, change: Callable[[dict[str, Any]], object], reason: str) -> None:
    edit_tensors(folder, change)
    with pytest.raises(ModelUnusable, match=reason):
        check_folder(folder)


def test_untied_model_must_bring_its_output_layer(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(ModelUnusable, match="lm_head"):
        check_folder(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    folder = write_tiny_gpt2(tmp_path, dtype=dtype)
    edit_tensors(folder, lambda tensors: tensors["transformer.h.1.mlp.c_fc.weight"][-1, -1].fill_(value))
    check_folder(folder)
    with pytest.raises(ModelUnusable, match="h.1.mlp.c_fc.weight"):
        check_finite(folder)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("config.json", {"model_type": "llama"}, "not a GPT-2"),
        ("config.json", {"auto_map": {"AutoModel": "x.y"}}, "own code"),
        ("config.json", {"layer_norm_epsilon": "small"}, "layer_norm_epsilon"),
        ("config.json", {"activation_function": ["gelu"]}, "activation_function"),
        ("config.json", {"vocab_size": 10**9}, "vocab_size"),
        ("config.json", {"vocab_size": 511}, "vocab_size|shape"),
        ("config.json", {"custom_code": True}, "custom_code"),
        ("config.json", {"trust_remote_code": True}, "trust_remote_code"),
        ("config.json", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("config.json", {"add_cross_attention": True}, "cross attention"),
        ("config.json", {"add_cross_attention": "no"}, "cross attention"),
        ("config.json", {"num_attention_heads": 4}, "num_attention_heads"),
        ("config.json", {"hidden_size": 64}, "hidden_size"),
        ("config.json", {"tie_word_embeddings": 0}, "tie_word_embeddings"),
        ("config.json", {"scale_attn_weights": "false"}, "scale_attn_weights"),
        ("config.json", {"scale_attn_by_inverse_layer_idx": 1}, "scale_attn_by_inverse_layer_idx"),
        ("config.json", {"activation_function": "quick_gelu"}, "activation_function"),
        ("config.json", {"n_layer": 49}, "n_layer"),
        ("config.json", {"n_layer": 2.0}, "n_layer"),
        ("config.json", {"n_layer": 10**100}, "n_layer"),
        ("config.json", {"n_positions": 4096}, "n_positions"),
        ("config.json", {"n_embd": 1664}, "n_embd"),
        ("config.json", {"n_inner": -1}, "n_inner"),
        ("config.json", {"n_head": 3}, "multiple of n_head"),
        ("config.json", {"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon"),
        ("config.json", {"tokenizer_class": "BertTokenizer"}, "GPT-2's"),
        ("tokenizer_config.json", {"tokenizer_class": ["GPT2Tokenizer"]}, "GPT-2's"),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "byte-pair"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}}}, "byte-pair"),
        ("tokenizer.json", {"pre_tokenizer": None}, "byte-pair"),
        ("tokenizer.json", {"decoder": {"type": "WordPiece"}}, "byte-pair"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 1}, "dropout": 0.5}}, "byte-pair"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.y", None]}}, "own code"),
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}, "GPT-2's"),
        ("tokenizer.json", {"added_tokens": [{"id": 512, "content": "x"}]}, "highest token is 512"),
        ("tokenizer.json", {"model": {"type": "Unigram", "vocab": []}}, "byte-pair"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}}, "added_tokens": []}, "no vocabulary"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": "b"}}}, "token numbers"),
    ],
)
def test_wrong_settings_are_refused(folder: Path, name: str, changes: dict[str, Any], reason: str) -> None:
    edit_json(folder / name, **changes)
    with pytest.raises(ModelUnusable, match=reason):
        check_folder(folder)


def test_settings_that_transformers_saves_pass(folder: Path) -> None:
    edit_json(
        folder / "config.json", scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True, use_cache=False,
        task_specific_params={"text-generation": {"do_sample": True}}, add_cross_attention=False, n_ctx=64,
        tokenizer_class=None, torch_dtype="float32", num_hidden_layers=2,
    )  # fmt: skip
    check_folder(folder)


def test_tokenizer_files_beyond_ten_megabytes_are_not_read(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "merges.txt").write_text("a b\n" * 2_500_001)
    with pytest.raises(ModelUnusable, match="merges.txt has more than 10,000,000 bytes"):
        check_folder(folder)


def test_links_are_refused(folder: Path) -> None:
    os.symlink("/etc/passwd", folder / "README.md")
    with pytest.raises(ModelUnusable, match="link"):
        check_folder(folder)


def test_absent_and_broken_files_are_refused(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    for content in ("{", "[]", "[" * 100_000):
        (folder / "config.json").write_text(content)
        with pytest.raises(ModelUnusable, match="JSON"):
            check_folder(folder)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelUnusable, match="safetensors"):
        check_folder(folder)


def header(table: Any, *, length: int | None = None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\0",
        header({}, length=2**63),
        header({}) + b"left over",
        header(b'{"a": 1, "a": 2}'),
        header(b"[" * 10_000),
        header([]),
        header({"a": 3}),
        header({"a": entry(0, 4, [1])}) + b"abc",
        header({"a": entry(4, 8, [1])}) + b"abcdefgh",
        header({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}) + b"abcd",
        header({"a": entry(0, 4, [2])}) + b"abcd",
        header({"a": entry(0, -4, [-1])}),
        header({"a": entry(0, 4, [1.0])}) + b"abcd",  # type: ignore[list-item]
        header({"a": entry(0, 4, [True])}) + b"abcd",
        header({"a": entry(0, 4, [1], "F4096")}) + b"abcd",
        header({"a": entry(0, 4, [2**80, 0])}) + b"abcd",
        header({"a": entry(0, 4, [2**63, 2])}) + b"abcd",
        header({"a": entry(0, 2**64, [2**62])}),
        header({"a": entry(2**63, 2**63 + 4, [1])}) + b"abcd",
        header({"a": entry(0, 0, [0] * 100)}),
        header({"a": entry(4, 0, [-1])}) + b"abcd",
        header({"a": entry(0, 4, [1], "f32")}) + b"abcd",
        header({"a": {"dtype": "F32", "shape": [1]}}) + b"abcd",
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}) + b"abcd",
        header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [False, 16]}}) + bytes(16),
        header({"a": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}}) + b"abcd",
        header({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}) + bytes(12),
        header({"a": entry(0, 4, [1]), "b": entry(2, 6, [1])}) + bytes(6),
        header({"a": entry(0, 4, [1]), "b": entry(0, 0, [0]), "c": entry(8, 8, [0])}) + b"abcd",
        header({f"w{i}": entry(0, 0, [0]) for i in range(100_000)}),
        header(b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [1], "data_offsets": [0, 4]}}') + b"abcd",
        header(b'{"a": {"dtype": "F32", "shape": [-0], "data_offsets": [0, 0]}}'),
        header(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 0]}}'),
        header(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 0]}}'),
        header(b'{"a": ' + b"[" * 5_000 + b"]" * 5_000 + b"}"),
        header("{}".encode("utf-16")),
        header(b"\xef\xbb\xbf{}"),
        header(b" {}"),
        header(b'{"\xff": 1}'),
        header(b"{}\0"),
        header({"__metadata__": []}),
        header({"__metadata__": None}),
        header({"__metadata__": {"format": 1}}),
    ],
)
def test_file_that_breaks_a_rule_of_the_format_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ModelUnusable, match="damaged"):
        read_header(tmp_path / "x")


def test_empty_and_oddly_named_tensors_are_no_lie(tmp_path: Path) -> None:
    table = {"é\ud800": entry(0, 0, [0, 2**39]), "a": entry(0, 4, []), "b": entry(4, 4, [0])}
    (tmp_path / "x").write_bytes(header(table) + b"abcd")
    assert [(tensor.name, tensor.end - tensor.start) for tensor in read_header(tmp_path / "x")] == [
        ("é\ud800", 0), ("a", 4), ("b", 0)
    ]  # fmt: skip


def test_header_that_we_write_is_as_safetensors_reads_it(tmp_path: Path) -> None:
    tensors = [("wte.weight", "F32", (3, 2)), ("évil", "F16", ()), ("none", "BF16", (0, 4))]
    data = torch.arange(6.0).numpy().tobytes() + torch.tensor(7, dtype=torch.float16).numpy().tobytes()
    (tmp_path / "x").write_bytes(encode_header(tensors) + data)
    read = load_file(tmp_path / "x")
    assert read["wte.weight"].tolist() == [[0, 1], [2, 3], [4, 5]] and read["évil"] == 7
    assert {entry.name for entry in read_header(tmp_path / "x")} == read.keys()
    assert len(encode_header(tensors)) % 8 == 0


def test_mutated_weights_are_refused_or_have_their_whole_form(folder: Path) -> None:
    """One random byte of the first 4 KiB or the length changed, 500 times: nothing but a refusal is raised."""
    path, rng = folder / "model.safetensors", random.Random(0)
    original = path.read_bytes()
    num_refused = 0
    for _ in range(500):
        mutated = bytearray(original)
        if rng.random() < 0.2:
            del mutated[rng.randrange(len(mutated)) :]
        else:
            mutated[rng.randrange(4096)] = rng.randrange(256)
        path.write_bytes(mutated)
        try:
            check_folder(folder)
            check_finite(folder)
        except ModelUnusable:
            num_refused += 1
    assert num_refused > 250
