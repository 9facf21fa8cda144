"""Pickled checkpoints become safetensors that compute the same, and pickles that do more are not run."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from serve.errors import ModelUnusable
from serve.store.convert import convert_weights, shard_names
from serve.store.revisions import Store
from serve.store.validate import check_finite, check_folder
from tests.fakes.models import write_tiny_gpt2


def write_old_checkpoint(
    folder: Path, *, dtype: torch.dtype = torch.float32, zipped: bool = True, **kwargs: Any
) -> Path:
    """As transformers 3 saved it: a tied output layer in the same storage, and a causal mask in each layer."""
    write_tiny_gpt2(folder, dtype=dtype, **kwargs)
    (folder / "tokenizer.json").unlink()
    state = OrderedDict(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    for layer in range(2):
        state[f"transformer.h.{layer}.attn.bias"] = torch.tril(torch.ones(64, 64, dtype=torch.uint8)).view(1, 1, 64, 64)
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    state.setdefault("lm_head.weight", state["transformer.wte.weight"])
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.as_tensor(model(torch.arange(1, 30)[None]).logits)


class Malicious:
    """Makes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_old_checkpoint_computes_the_same_after_conversion(tmp_path: Path, dtype: torch.dtype, zipped: bool) -> None:
    expected = logits(write_tiny_gpt2(tmp_path / "new", dtype=dtype, seed=3))
    old = write_old_checkpoint(tmp_path / "old", dtype=dtype, zipped=zipped, seed=3)

    imported = Store(tmp_path / "data", embedded={}).import_folder(old, "huggingtweets/ada").path

    assert torch.equal(logits(imported), expected)
    tensors = load_file(imported / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert "lm_head.weight" not in tensors and not any(name.endswith(".attn.bias") for name in tensors)
    assert "transformer.wte.weight" in tensors and not list(imported.glob("*.bin"))


def test_output_layer_of_its_own_is_kept(tmp_path: Path) -> None:
    old = write_old_checkpoint(tmp_path / "old", tie=False)
    convert_weights(old / "pytorch_model.bin", old / "model.safetensors")
    assert "lm_head.weight" in load_file(old / "model.safetensors")
    check_folder(old)
    check_finite(old)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_shards_become_one_file(tmp_path: Path, suffix: str) -> None:
    folder = write_tiny_gpt2(tmp_path / "sharded")
    tensors = load_file(folder / "model.safetensors")
    stem = "pytorch_model" if suffix == "bin" else "model"
    index: dict[str, str] = {}
    for part, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), start=1):
        shard = f"{stem}-{part:05}-of-00002.{suffix}"
        chosen = {name: tensors[name] for name in names}
        if suffix == "bin":
            torch.save(chosen, folder / shard)
        else:
            save_file(chosen, folder / shard)
        index |= dict.fromkeys(names, shard)
    (folder / "model.safetensors").unlink()
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))

    imported = Store(tmp_path / "data", embedded={}).import_folder(folder, "huggingtweets/ada").path

    merged = load_file(imported / "model.safetensors")
    assert merged.keys() == tensors.keys() and all(torch.equal(merged[name], tensors[name]) for name in tensors)
    assert not list(imported.glob("*-of-*"))


@pytest.mark.parametrize(
    "index", ["{", "[]", "{}", '{"weight_map": {"a": "../../etc/passwd"}}', '{"weight_map": {"a": 3}}']
)
def test_index_that_names_other_files_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelUnusable):
        shard_names(tmp_path / "model.safetensors.index.json")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_does_something_is_not_run(tmp_path: Path, zipped: bool) -> None:
    old = write_old_checkpoint(tmp_path / "old")
    torch.save({"x": Malicious(tmp_path / "harm")}, old / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    torch.load(old / "pytorch_model.bin", weights_only=False)
    (tmp_path / "harm").rmdir()  # the bait works

    store = Store(tmp_path / "data", embedded={})
    with pytest.raises(ModelUnusable, match="more than tensors"):
        store.import_folder(old, "huggingtweets/ada")

    assert not (tmp_path / "harm").exists()
    assert os.listdir(tmp_path / "data/models/.staging") == []


@pytest.mark.parametrize("value", [[1, 2], {"x": 3}, {1: torch.zeros(1)}, {"x": torch.zeros(1).to_sparse()}])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_checkpoint_of_anything_but_named_tensors_is_refused(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "x.bin")
    with pytest.raises(ModelUnusable):
        convert_weights(tmp_path / "x.bin", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04" + b"\0" * 100])
def test_damaged_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ModelUnusable):
        convert_weights(tmp_path / "x.bin", tmp_path / "x.safetensors")


def test_conversion_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.bin")  # nobody writes: the reader would wait for ever
    with pytest.raises(ModelUnusable, match="within"):
        convert_weights(tmp_path / "x.bin", tmp_path / "x.safetensors", timeout_s=0.5)
