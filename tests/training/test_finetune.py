from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors import safe_open

from serve.errors import BadUpload, ModelUnusable, TrainingFailed
from serve.training.evaluate import held_out_loss, preview
from serve.training.finetune import (
    FineTuneSpec,
    Progress,
    Stopped,
    cut_blocks,
    encode,
    end_of_text_id,
    find_checkpoint,
    finetune,
    load_tokenizer,
    suggested_batch_size,
    suggested_multiplier,
)
from serve.training.gpt2 import GPT2, read_base
from tests.fakes.logs import captured_lines
from tests.fakes.models import END_OF_TEXT, write_tiny_gpt2
from tests.training.making import made_up_texts


@pytest.fixture
def spec(tmp_path: Path) -> FineTuneSpec:
    texts = made_up_texts(60)
    return FineTuneSpec(
        base=write_tiny_gpt2(tmp_path / "base", dtype=torch.bfloat16),
        epochs=[texts[:50], texts[49::-1]],
        held_out=texts[50:],
        out=tmp_path / "out",
        seed=3,
        num_previews=2,
        num_threads=1,
    )


def _hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_held_out_loss_falls_and_every_step_is_told(spec: FineTuneSpec) -> None:
    seen: list[Progress] = []
    result = finetune(replace(spec, learning_rate=2e-3), on_progress=seen.append)
    assert result.loss_before and result.loss_after and result.loss_after < result.loss_before - 0.5
    last = result.num_steps
    assert [progress.step for progress in seen] == [*range(last + 1), last]
    assert (seen[0].total_steps, seen[0].valid_loss, seen[0].train_loss) == (last, result.loss_before, None)
    half_way = -(-last // 2)  # where the first of two epochs ends
    assert [progress.step for progress in seen if progress.samples] == [half_way, last]
    [sample] = seen[half_way].samples
    assert sample.startswith("My dream is") and seen[half_way].valid_loss is not None
    assert (seen[-1].valid_loss_before, seen[-1].valid_loss) == (result.loss_before, result.loss_after)
    assert seen[-1].samples == result.previews
    assert seen[-1].seconds_left == 0 and seen[-1].tokens == result.trained_tokens
    assert seen[1].learning_rate == pytest.approx(2e-3, rel=0.01) and seen[-1].learning_rate < 2e-5  # cosine
    assert len(result.previews) == 2 and all(text.startswith("My dream is") for text in result.previews)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_seed_gives_the_same_bytes_and_another_seed_others(
    spec: FineTuneSpec, tmp_path: Path, dtype: Literal["float32", "bfloat16"]
) -> None:
    spec = replace(spec, dtype=dtype)
    first = finetune(spec)
    again = finetune(replace(spec, out=tmp_path / "again"))
    finetune(replace(spec, out=tmp_path / "other", seed=4))
    assert _hash(tmp_path / "again") == _hash(spec.out) != _hash(tmp_path / "other")
    assert (first.loss_after, first.previews) == (again.loss_after, again.previews)


def test_folder_has_the_dtype_of_the_base_its_tokenizer_and_sampling_defaults(
    spec: FineTuneSpec,
) -> None:
    assert finetune(spec).dtype == "bfloat16"
    with safe_open(spec.out / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (spec.out / name).read_bytes() == (spec.base / name).read_bytes()
    config = json.loads((spec.out / "config.json").read_text())
    assert config["use_cache"] is True and config["dtype"] == "bfloat16"
    assert json.loads((spec.out / "generation_config.json").read_text()) == {
        "bos_token_id": END_OF_TEXT,
        "do_sample": True,
        "eos_token_id": END_OF_TEXT,
        "max_length": 64,  # 160 where the context has room for it
        "min_length": 10,
        "temperature": 1.0,
        "top_p": 0.95,
    }


def test_transformers_pipeline_opens_the_folder_as_it_is(spec: FineTuneSpec) -> None:
    from transformers import pipeline

    finetune(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own
        generator = pipeline("text-generation", model=str(spec.out))
        [answer] = generator("My dream is")
    assert answer["generated_text"].startswith("My dream is")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_f3_stopped_training_goes_on_from_its_checkpoint_to_the_same_bytes(
    spec: FineTuneSpec, tmp_path: Path, dtype: Literal["float32", "bfloat16"]
) -> None:
    spec = replace(spec, dtype=dtype)
    whole = finetune(spec)
    work = tmp_path / "work"
    steps: list[int] = []
    half = replace(spec, out=tmp_path / "half", work=work / "1", checkpoint_every_s=0.0)
    with pytest.raises(Stopped):
        finetune(half, on_progress=lambda p: steps.append(p.step), should_stop=lambda: steps[-1:] == [7])
    assert not (tmp_path / "half" / "model.safetensors").exists()
    checkpoint = find_checkpoint(work)
    assert checkpoint is not None and checkpoint.name == "checkpoint-7"
    assert [path.name for path in (work / "1").iterdir()] == ["checkpoint-7"]
    rest: list[int] = []
    resumed = replace(spec, out=tmp_path / "resumed", work=work / "2", resume_from=checkpoint)
    result = finetune(resumed, on_progress=lambda p: rest.append(p.step))
    assert rest[0] == 8 and [p.step for p in result.history] == list(range(1, result.num_steps + 1))
    assert _hash(tmp_path / "resumed") == _hash(spec.out)
    assert [p.train_loss for p in result.history] == [p.train_loss for p in whole.history]
    assert (result.loss_before, result.loss_after) == (whole.loss_before, whole.loss_after)


def test_f3_killed_training_goes_on_from_its_checkpoint_to_the_same_bytes(spec: FineTuneSpec, tmp_path: Path) -> None:
    finetune(spec)
    work = tmp_path / "work"
    killed = replace(spec, out=tmp_path / "killed", work=work / "1", checkpoint_every_s=0.0)
    child = multiprocessing.get_context("spawn").Process(target=_train_and_die, args=(killed, 11))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    checkpoint = find_checkpoint(work)
    assert checkpoint is not None
    finetune(replace(spec, out=tmp_path / "resumed", work=work / "2", resume_from=checkpoint))
    assert _hash(tmp_path / "resumed") == _hash(spec.out)


def _train_and_die(spec: FineTuneSpec, step: int) -> None:
    def on_progress(progress: Progress) -> None:
        if progress.step >= step and spec.work is not None and find_checkpoint(spec.work.parent) is not None:
            os.kill(os.getpid(), signal.SIGKILL)

    finetune(spec, on_progress=on_progress)


@pytest.mark.parametrize("damage", ["another", "truncated", "version"])
def test_checkpoint_that_does_not_fit_is_not_used(spec: FineTuneSpec, tmp_path: Path, damage: str) -> None:
    steps: list[int] = []
    half = replace(spec, work=tmp_path / "work" / "1", seed=9 if damage == "another" else spec.seed)
    with pytest.raises(Stopped):
        finetune(half, on_progress=lambda p: steps.append(p.step), should_stop=lambda: steps[-1:] == [3])
    checkpoint = find_checkpoint(tmp_path / "work")
    assert checkpoint is not None
    if damage == "truncated":
        (checkpoint / "state.safetensors").write_bytes((checkpoint / "state.safetensors").read_bytes()[:-100])
    elif damage == "version":  # as an earlier version of the service wrote them
        for path in checkpoint.iterdir():
            path.rename(checkpoint / f"old-{path.name}")
    seen: list[int] = []
    with captured_lines() as lines:
        finetune(replace(spec, resume_from=checkpoint), on_progress=lambda p: seen.append(p.step))
    assert seen[:2] == [0, 1]
    assert [line["event"] for line in lines if line["log_level"] == "warning"] == ["checkpoint_ignored"]


def test_checkpoint_that_cannot_be_written_ends_training(spec: FineTuneSpec, tmp_path: Path) -> None:
    (tmp_path / "work").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="work"):
        finetune(replace(spec, work=tmp_path / "work" / "1", checkpoint_every_s=0.0))


def test_checkpoint_that_was_cut_off_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "1" / "checkpoint-30").mkdir(parents=True)
    assert find_checkpoint(tmp_path) is None
    (tmp_path / "1" / "checkpoint-9").mkdir()
    (tmp_path / "1" / "checkpoint-9" / "COMPLETE").touch()
    found = find_checkpoint(tmp_path)
    assert found and found.name == "checkpoint-9"


def test_stream_begins_and_ends_each_text_with_end_of_text_and_drops_the_rest(spec: FineTuneSpec) -> None:
    tokenizer = load_tokenizer(spec.base)
    end_id = end_of_text_id(tokenizer)
    whole = cut_blocks([["one two"], ["three"]], tokenizer, end_id, 1000)
    one, three = tokenizer.encode("one two").ids, tokenizer.encode("three").ids
    assert whole.tolist() == [[end_id, *one, end_id, *three, end_id]]  # no epoch begins with a second one
    blocks = cut_blocks([["one two"], ["three"]], tokenizer, end_id, 4)
    assert blocks.shape[1] == 4 and blocks.flatten().tolist() == whole[0, : blocks.numel()].tolist()


def test_text_that_spells_end_of_text_does_not_end_it(spec: FineTuneSpec) -> None:
    tokenizer = load_tokenizer(spec.base)
    blocks = cut_blocks([["what does <|endoftext|> mean"]], tokenizer, end_of_text_id(tokenizer), 1000)
    assert (blocks == END_OF_TEXT).sum() == 2


def _published_loss(folder: Path, held_out: Sequence[str]) -> float:
    """By transformers, in float32, text by text."""
    from transformers import GPT2LMHeadModel

    model, tokenizer = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32), load_tokenizer(folder)
    total, count = 0.0, 0
    for text in held_out:
        ids = torch.tensor([[END_OF_TEXT, *tokenizer.encode(text).ids, END_OF_TEXT]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


def test_held_out_loss_does_not_depend_on_how_texts_are_batched(
    spec: FineTuneSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = read_base(spec.base)
    model = GPT2(base.shape, base.weights)
    texts = encode(load_tokenizer(spec.base), spec.held_out)
    together = held_out_loss(model, texts, END_OF_TEXT)
    assert together == pytest.approx(_published_loss(spec.base, spec.held_out), abs=1e-5)
    monkeypatch.setattr("serve.training.evaluate.BATCH_TOKENS", 1)
    assert together == pytest.approx(held_out_loss(model, texts, END_OF_TEXT), abs=1e-5)
    assert held_out_loss(model, [], END_OF_TEXT) is None


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 5e-3)])
def test_loss_after_training_is_that_of_the_published_weights(
    spec: FineTuneSpec, dtype: Literal["float32", "bfloat16"], tolerance: float
) -> None:
    result = finetune(replace(spec, dtype=dtype))
    assert result.bf16 is (dtype == "bfloat16")
    assert result.loss_after == pytest.approx(_published_loss(spec.out, spec.held_out), abs=tolerance)


def test_each_epoch_but_the_last_ends_with_a_loss_and_a_model_if_wanted(spec: FineTuneSpec, tmp_path: Path) -> None:
    told: list[Progress] = []
    epochs: list[Progress] = []

    def on_epoch(progress: Progress, write: Callable[[Path], None]) -> None:
        epochs.append(progress)
        write(tmp_path / f"epoch-{len(epochs)}")

    three = replace(spec, epochs=[*spec.epochs, spec.epochs[0]])
    result = finetune(three, on_progress=told.append, on_epoch=on_epoch)
    assert [p.step for p in epochs] == [math.ceil(result.num_steps * k / 3) for k in (1, 2)]
    assert [p for p in result.history if p.valid_loss is not None] == epochs
    assert [p.valid_loss for p in told if p.valid_loss is not None] == [
        result.loss_before, *(p.valid_loss for p in epochs), result.loss_after
    ]  # fmt: skip
    for number, progress in enumerate(epochs, 1):
        folder = tmp_path / f"epoch-{number}"
        assert {path.name for path in folder.iterdir()} == {path.name for path in spec.out.iterdir()}
        assert progress.valid_loss == pytest.approx(_published_loss(folder, spec.held_out), abs=5e-3)


def test_base_that_is_deleted_while_it_is_learnt_from_leaves_its_tokenizer(spec: FineTuneSpec) -> None:
    tokenizer = (spec.base / "tokenizer.json").read_bytes()
    finetune(spec, on_progress=lambda progress: shutil.rmtree(spec.base, ignore_errors=True))
    assert (spec.out / "tokenizer.json").read_bytes() == tokenizer


def test_writing_texts_draws_nothing_from_torch(spec: FineTuneSpec) -> None:
    base, tokenizer = read_base(spec.base), load_tokenizer(spec.base)
    model, state = GPT2(base.shape, base.weights), torch.get_rng_state()
    texts = [preview(model, tokenizer, num_texts=2, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and torch.equal(state, torch.get_rng_state())


def test_nothing_to_learn_from_is_refused(spec: FineTuneSpec) -> None:
    with pytest.raises(BadUpload, match="no text"):
        finetune(replace(spec, epochs=[[]]))


def test_broken_base_is_refused(spec: FineTuneSpec) -> None:
    (spec.base / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelUnusable, match="weights"):
        finetune(spec)


def test_loss_that_is_not_a_number_ends_training_with_a_reason(spec: FineTuneSpec) -> None:
    with pytest.raises(TrainingFailed, match="learning_rate_multiplier"):
        finetune(replace(spec, learning_rate=1e30))


def test_training_writes_no_progress_bars(spec: FineTuneSpec, capfd: pytest.CaptureFixture[str]) -> None:
    with captured_lines() as lines:
        finetune(spec)
    out, err = capfd.readouterr()
    assert out == "" and err == ""
    assert [line["event"] for line in lines] == ["finetune_phases"]


def test_a_base_may_suggest_a_larger_learning_rate(tmp_path: Path) -> None:
    assert suggested_multiplier(tmp_path) == 1.0
    for text, expected in (('{"learning_rate_multiplier": 4}', 4.0), ('{"learning_rate_multiplier": -1}', 1.0),
                           ('{"learning_rate_multiplier": "x"}', 1.0), ("[", 1.0)):  # fmt: skip
        (tmp_path / "training.json").write_text(text)
        assert suggested_multiplier(tmp_path) == expected


def test_auto_takes_as_many_tokens_a_step_as_huggingtweets_and_scales_the_rate_by_the_root(tmp_path: Path) -> None:
    much, little = [["x" * 4096] * 96], [["x" * 4096] * 90]
    for length, expected in ((256, 4), (1024, 1), (2048, 1)):
        base = write_tiny_gpt2(tmp_path / str(length), n_positions=length)
        assert suggested_batch_size(base, much) == expected
        assert suggested_batch_size(base, little) == 1
    assert suggested_multiplier(tmp_path, 4) == 2 * suggested_multiplier(tmp_path) == 2.0
