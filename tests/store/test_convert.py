"""Pickled checkpoints become safetensors that compute the same, and pickles that do more are not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from serve.errors import DiskFull, ModelUnusable, StoreUnavailable
from serve.store import convert
from serve.store.convert import convert_weights, shard_names
from serve.store.model_files import copy_model
from serve.store.revisions import Store
from serve.store.sandbox import CannotConfine, Limits
from serve.store.validate import check_finite, check_folder
from tests.fakes.models import write_tiny_gpt2
from tests.faults.converter_forks import Forks, forks
from tests.faults.mutate_weights import ModelReader
from tests.faults.payloads import Call, payloads, write_payload


@pytest.fixture(scope="module")
def _forks() -> Iterator[Forks]:
    with forks() as process:
        yield process


@pytest.fixture(scope="module")
def _trusting_forks() -> Iterator[Forks]:
    with forks(trusting=True) as process:
        yield process


@pytest.fixture
def converter(_forks: Forks, monkeypatch: pytest.MonkeyPatch) -> Forks:
    """The converter in forks of one process, which spares each test the imports."""
    monkeypatch.setattr(convert, "run_apart", _forks.run)
    return _forks


@pytest.fixture
def trusting_converter(_trusting_forks: Forks, monkeypatch: pytest.MonkeyPatch) -> Forks:
    """The same, but pickles are run."""
    monkeypatch.setattr(convert, "run_apart", _trusting_forks.run)
    return _trusting_forks


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


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_old_checkpoint_computes_the_same_after_conversion(
    tmp_path: Path, converter: Forks, dtype: torch.dtype, zipped: bool
) -> None:
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


# --- As transformers reads it ---------------------------------------------------------------------------------

DTYPES = ("float32", "float16", "bfloat16", "float64", "mixed")
FORMATS = ("zip", "legacy", "bin shards", "safetensors shards", "safetensors")
NAMES = ("prefixed", "bare", "some prefixed", "with masks")
HEADS = ("tied", "tied, stored", "tied, another stored", "untied", "untied, equal")
MATRIX = [
    pytest.param(
        form,
        dtype,
        NAMES[(f + d + turn) % len(NAMES)],
        HEADS[(f + 2 * d + 3 * turn) % len(HEADS)],
        marks=[pytest.mark.slow] if turn else [],
    )
    for turn in range(2)
    for f, form in enumerate(FORMATS)
    for d, dtype in enumerate(DTYPES)
    if (form, dtype) != ("safetensors", "float64")  # refused: only what is converted can change its dtype
]


def write_checkpoint(folder: Path, form: str, dtype: str, names: str, head: str) -> Path:
    """A tiny model in one of the ways in which the Hub's models were saved."""
    write_tiny_gpt2(folder, tie=head.startswith("tied"))
    weights: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    generator = torch.Generator().manual_seed(1)
    for number, (name, tensor) in enumerate(weights.items()):
        chosen = DTYPES[number % 4] if dtype == "mixed" and form != "safetensors" else DTYPES[number % 3]
        weights[name] = tensor.to(getattr(torch, chosen if dtype == "mixed" else dtype))
    embedding = weights["transformer.wte.weight"]
    if head in ("tied, stored", "untied, equal"):
        weights["lm_head.weight"] = embedding.clone() if "safetensors" in form else embedding
    if head == "tied, another stored":
        weights["lm_head.weight"] = torch.randn(embedding.shape, generator=generator).to(embedding.dtype)
    if names == "with masks":
        weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
        weights["transformer.h.1.attn.masked_bias"] = torch.tensor(-torch.inf)
    if names in ("bare", "some prefixed"):
        bare = [name for i, name in enumerate(weights) if names == "bare" or i % 2]
        weights = {name.removeprefix("transformer.") if name in bare else name: t for name, t in weights.items()}
    save_in(folder, form, weights)
    return folder


def save_in(folder: Path, form: str, weights: dict[str, torch.Tensor]) -> None:
    if form == "safetensors":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif not form.endswith("shards"):
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")
    else:
        stem, suffix = ("pytorch_model", "bin") if form == "bin shards" else ("model", "safetensors")
        index: dict[str, str] = {}
        for part, names in enumerate((list(weights)[::2], list(weights)[1::2]), start=1):
            shard, chosen = f"{stem}-{part:05}-of-00002.{suffix}", {name: weights[name] for name in names}
            index |= dict.fromkeys(names, shard)
            if suffix == "bin":
                torch.save(chosen, folder / shard)
            else:
                save_file(chosen, folder / shard, metadata={"format": "pt"})
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize(("form", "dtype", "names", "head"), MATRIX)
def test_every_kind_of_checkpoint_computes_as_transformers_reads_it(
    tmp_path: Path, converter: Forks, form: str, dtype: str, names: str, head: str
) -> None:
    folder = write_checkpoint(tmp_path / "theirs", form, dtype, names, head)
    staged = tmp_path / "ours"
    staged.mkdir()
    copy_model(folder, staged)
    check_folder(staged)
    check_finite(staged)
    expected = logits(folder)
    assert torch.equal(logits(staged), expected)
    stored = {tensor.dtype for tensor in load_file(staged / "model.safetensors").values()}
    assert stored <= {torch.float32, torch.float16, torch.bfloat16, torch.uint8}

    reader = ModelReader(staged)
    with ThreadPoolExecutor() as executor:  # whose thread keeps the low priority of whoever loads a model
        prompt, token, logprob = executor.submit(reader.generate, reader.facts()).result()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert float(model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[token]) == pytest.approx(
            logprob, abs=1e-3
        )


# --- Harm -----------------------------------------------------------------------------------------------------

PAYLOADS = sorted(payloads(Path(tempfile.mkdtemp()) / "harm"))


def hide(folder: Path, name: str, where: str) -> tuple[Path, Path]:
    """A model folder with a payload in it, and the folder that the payload makes."""
    write_tiny_gpt2(folder)
    harm = folder.with_name("harm")
    payload = payloads(harm)[name]
    good = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if where == "a shard":
        save_in(folder, "bin shards", good)
        write_payload(folder / "pytorch_model-00002-of-00002.bin", payload)
    elif where == "model.safetensors":
        write_payload(folder / "model.safetensors", payload)
    elif where == "a safetensors shard":
        save_in(folder, "safetensors shards", good)
        write_payload(folder / "model-00002-of-00002.safetensors", payload)
    else:
        write_payload(folder / "pytorch_model.bin", payload, zipped=where == "zip")
    return folder, harm


def baits(*places: str) -> list[Any]:
    """Every payload in one place and every place with some; all in all of them where there is time."""
    return [
        pytest.param(name, where, marks=[pytest.mark.slow] if (n + w) % len(places) else [])
        for n, name in enumerate(PAYLOADS)
        for w, where in enumerate(places)
    ]


def test_every_bait_works_where_nothing_stops_it(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{number}.bin" for number, name in enumerate(PAYLOADS)}
    for name, payload in payloads(tmp_path / "harm").items():
        write_payload(files[name], payload)
    script = """
import contextlib, os, sys, torch
for file in sys.argv[2:]:
    with contextlib.suppress(Exception):
        torch.load(file, weights_only=False)
    print(os.path.isdir(sys.argv[1]))
    with contextlib.suppress(OSError):
        os.rmdir(sys.argv[1])
"""
    command = [sys.executable, "-c", script, str(tmp_path / "harm"), *map(str, files.values())]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100)
    worked = [line for line in done.stdout.splitlines() if line in ("True", "False")]
    assert dict(zip(files, worked, strict=True)) == dict.fromkeys(files, "True"), done.stderr[-1000:]


@pytest.mark.parametrize(
    ("name", "where"), baits("zip", "legacy", "a shard", "model.safetensors", "a safetensors shard")
)
def test_pickle_that_does_something_is_not_run(tmp_path: Path, converter: Forks, name: str, where: str) -> None:
    folder, harm = hide(tmp_path / "model", name, where)
    staged = tmp_path / "staged"
    staged.mkdir()
    with pytest.raises(ModelUnusable, match="more than tensors|damaged"):
        copy_model(folder, staged)
        check_folder(staged)
    assert not harm.exists() and not (staged / "model.safetensors").exists() or where == "model.safetensors"


@pytest.mark.parametrize(("name", "where"), baits("zip", "legacy", "a shard"))
def test_pickle_that_is_run_does_no_harm(tmp_path: Path, trusting_converter: Forks, name: str, where: str) -> None:
    """With the first wall taken away, in a process that has all modules at hand."""
    folder, harm = hide(tmp_path / "model", name, where)
    staged = tmp_path / "staged"
    staged.mkdir()
    with pytest.raises(ModelUnusable):
        copy_model(folder, staged)
    assert not harm.exists()


def test_converter_without_its_first_wall_does_run_what_it_reads(tmp_path: Path, trusting_converter: Forks) -> None:
    """Or else the test before would prove nothing."""
    text = "what only runs can say"
    state = Call(
        dict, [["transformer.wte.weight", Call(Call(getattr, torch.ones(2), "add"), 1)], ["x.attn.bias", text]]
    )
    torch.save(state, tmp_path / "x.bin")
    convert_weights(tmp_path / "x.bin", tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors")["transformer.wte.weight"].tolist() == [2, 2]


def test_imported_malicious_model_leaves_nothing_behind(tmp_path: Path) -> None:
    folder, harm = hide(tmp_path / "model", "os.mkdir", "zip")
    store = Store(tmp_path / "data", embedded={})
    with pytest.raises(ModelUnusable, match="more than tensors"):
        store.import_folder(folder, "huggingtweets/ada")
    assert not harm.exists() and os.listdir(tmp_path / "data/models/.staging") == []


def test_machine_without_seccomp_opens_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(limits: Limits) -> None:
        raise CannotConfine("seccomp: Operation not permitted")

    monkeypatch.setattr(convert, "confine", cannot)
    with pytest.raises(ModelUnusable, match="model.safetensors work"):
        convert._confine(Limits(0, 0, 0))


# --- Lies -----------------------------------------------------------------------------------------------------


class Lie:
    """A tensor over ten values that says of itself what it likes."""

    def __init__(self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.view = (offset, shape, stride)

    def __reduce__(self) -> tuple[Any, ...]:
        storage = torch.arange(10.0)._typed_storage()  # type: ignore[no-untyped-call]
        return torch._utils._rebuild_tensor_v2, (storage, *self.view, False, OrderedDict())


def table(value: Any) -> dict[str, Any]:
    return {"transformer.wte.weight": value}


LIES: dict[str, tuple[Any, str]] = {
    "one value a billion times": (lambda: table(Lie(0, (2**30,), (0,))), "repeats values"),
    "one value ten times": (lambda: table(Lie(0, (10,), (0,))), "repeats values"),
    "overlapping rows": (lambda: table(Lie(0, (3, 3), (1, 1))), "repeats values"),
    "more values than there are": (lambda: table(Lie(0, (11,), (1,))), "damaged"),
    "values behind the last": (lambda: table(Lie(8, (10,), (1,))), "damaged"),
    "values before the first": (lambda: table(Lie(-2, (2,), (1,))), "damaged"),
    "backwards": (lambda: table(Lie(9, (10,), (-1,))), "damaged"),
    "a shape beyond counting": (lambda: table(Lie(0, (2**62, 2**62), (1, 1))), "damaged"),
    "the same weights under 9,999 names": (
        lambda: dict.fromkeys((f"w{i}" for i in range(9_999)), torch.zeros(1000)), "far more weights"),
    "a hundred thousand names": (lambda: dict.fromkeys(map(str, range(10**5)), 0), "more than"),
    "a terabyte of nothing": (lambda: table(Call(bytearray, 2**40)), "memory"),
    "a gigabyte of nothing": (lambda: table(Call(bytearray, 2**30)), "memory"),
    "sparse": (lambda: table(torch.eye(3).to_sparse()), "plain tensor"),
    "quantized": (lambda: table(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)), "plain tensor"),
    "without storage": (lambda: table(torch.ones(2, device="meta")), "plain tensor"),
    "nested": (lambda: table(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])), "plain tensor|damaged"),
    "negated": (lambda: table(torch._neg_view(torch.ones(2))), "plain tensor"),
    "complex": (lambda: table(torch.ones(2, dtype=torch.complex64)), "complex64"),
    "whole numbers": (lambda: table(torch.ones(2, dtype=torch.int8)), "int8"),
    "truths": (lambda: table(torch.ones(2, dtype=torch.bool)), "bool"),
    "eight bits": (lambda: table(torch.ones(2).to(torch.float8_e4m3fn)), "float8|damaged"),
    "no tensor": (lambda: table("text"), "plain tensor"),
    "a list": (lambda: [1, 2], "table of named tensors"),
    "numbered tensors": (lambda: {1: torch.zeros(1)}, "table of named tensors"),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["zip", "legacy"])
@pytest.mark.parametrize("lie", LIES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_checkpoint_that_lies_is_refused_within_seconds(
    tmp_path: Path, converter: Forks, lie: str, zipped: bool
) -> None:
    make, reason = LIES[lie]
    torch.save(make(), tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    started = time.monotonic()
    with pytest.raises(ModelUnusable, match=reason):
        convert_weights(tmp_path / "x.bin", tmp_path / "x.safetensors")
    assert time.monotonic() - started < 30
    assert os.listdir(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_archive_that_inflates_is_refused(tmp_path: Path, converter: Forks, compression: int) -> None:
    write_old_checkpoint(tmp_path / "old")
    with (
        zipfile.ZipFile(tmp_path / "old/pytorch_model.bin") as old,
        zipfile.ZipFile(tmp_path / "x.bin", "w", compression) as new,
    ):
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
        new.writestr("archive/data/bomb", bytes(2**26))
    with pytest.raises(ModelUnusable, match="compressed"):
        convert_weights(tmp_path / "x.bin", tmp_path / "x.safetensors")


def test_archive_with_a_flipped_bit_is_refused(tmp_path: Path, converter: Forks) -> None:
    """torch.load itself does not look at the checksums."""
    old = write_old_checkpoint(tmp_path / "old") / "pytorch_model.bin"
    content = bytearray(old.read_bytes())
    content[len(content) // 2] ^= 1
    old.write_bytes(content)
    torch.load(old, weights_only=True)
    with pytest.raises(ModelUnusable, match="checksum"):
        convert_weights(old, tmp_path / "x.safetensors")


def test_tensor_in_two_shards_is_refused(tmp_path: Path, converter: Forks) -> None:
    write_tiny_gpt2(tmp_path)
    save_in(tmp_path, "bin shards", load_file(tmp_path / "model.safetensors"))
    shards = sorted(tmp_path.glob("*-of-*"))
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(ModelUnusable, match="Two shards"):
        convert_weights(tmp_path / "pytorch_model.bin.index.json", tmp_path / "x.safetensors")


def test_absent_shard_is_named(tmp_path: Path, converter: Forks) -> None:
    write_tiny_gpt2(tmp_path)
    save_in(tmp_path, "bin shards", load_file(tmp_path / "model.safetensors"))
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ModelUnusable, match="lacks pytorch_model-00002"):
        convert_weights(tmp_path / "pytorch_model.bin.index.json", tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("status", "report", "expected", "reason"),
    [
        (4, b"28", DiskFull, "disk is full"),
        (4, b"5", StoreUnavailable, "Input/output error"),
        (4, b"x", ModelUnusable, "damaged"),
        (-9, b"", StoreUnavailable, "killed"),
        (-24, b"", ModelUnusable, "longer"),
        (-11, b"", ModelUnusable, "damaged"),
        (0, b"", ModelUnusable, "damaged"),
    ],
)
def test_what_is_no_fault_of_the_model_is_not_blamed_on_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    report: bytes,
    expected: type[Exception],
    reason: str,
) -> None:
    def end(arguments: list[str], file: IO[bytes], timeout_s: float) -> int:
        file.write(report)
        return status

    monkeypatch.setattr(convert, "run_apart", end)
    (tmp_path / "x.bin").touch()
    with pytest.raises(expected, match=reason):
        convert_weights(tmp_path / "x.bin", tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == ["x.bin"]


def test_disk_that_fills_up_is_told_from_a_damaged_model(tmp_path: Path) -> None:
    old = write_old_checkpoint(tmp_path / "old") / "pytorch_model.bin"
    os.symlink("/dev/full", tmp_path / "full")
    command = [sys.executable, "-m", "serve.store.convert", str(tmp_path / "full"), "tied", str(old)]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (4, b"28")


def test_what_a_process_gone_astray_says_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shout(arguments: list[str], report: IO[bytes], timeout_s: float) -> int:
        report.write(b"\xff" * 10**6)
        return 3

    monkeypatch.setattr(convert, "run_apart", shout)
    (tmp_path / "x.bin").touch()
    with pytest.raises(ModelUnusable) as caught:
        convert_weights(tmp_path / "x.bin", tmp_path / "x.safetensors")
    assert len(caught.value.message) <= 500


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04" + b"\0" * 100])
def test_damaged_checkpoint_is_refused(tmp_path: Path, converter: Forks, content: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ModelUnusable):
        convert_weights(tmp_path / "x.bin", tmp_path / "x.safetensors")


def test_conversion_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.bin")  # nobody writes: the reader would wait for ever
    with pytest.raises(ModelUnusable, match="within"):
        convert_weights(tmp_path / "x.bin", tmp_path / "x.safetensors", timeout_s=0.5)
