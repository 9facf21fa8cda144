"""The models that wait on the Hub, from the request to the text: a huggingtweets repository of 2021 just works."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from serve.errors import ModelNotFound
from serve.generator import LocalGenerator
from serve.settings import Settings
from serve.store.opening import open_store
from serve.store.revisions import Revision
from serve.types import EVERYBODY, Delta, GenerationRequest
from tests.fakes.hub import FakeHub
from tests.fakes.models import END_OF_TEXT, write_tiny_gpt2
from tests.store.test_convert import write_old_checkpoint

SOLAR = "huggingtweets/solarmonke"


@pytest.fixture
def settings(server: FakeHub, tmp_path: Path) -> Settings:
    return Settings(data=tmp_path / "data", dtype="float32", memory_bytes=1 << 28, hub_endpoint=server.endpoint)


@pytest.fixture
async def generator(settings: Settings) -> AsyncIterator[LocalGenerator]:
    generator = LocalGenerator(settings)
    yield generator
    await generator.close()


async def test_model_that_makes_room_before_it_is_loaded_comes_again(
    server: FakeHub, generator: LocalGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(SOLAR, write_tiny_gpt2(tmp_path / "repo"))
    locate, num_located = generator._locator.locate, 0

    async def locate_and_lose(model_id: str, **wish: Any) -> tuple[Revision, float]:
        nonlocal num_located
        found, fetch_s = await locate(model_id, **wish)
        num_located += 1
        if num_located in (1, 3):  # at first before anything is known of it, then when only its weights are missing
            generator._loader._store.drop_revision(found.model_id, found.revision)
            await generator._pool.forget(lambda key: True)
        return found, fetch_s

    monkeypatch.setattr(generator._locator, "locate", locate_and_lose)
    for _ in range(2):
        request = GenerationRequest(SOLAR, ("a",), {"max_new_tokens": 2, "ignore_eos": True})
        deltas = [delta async for some in generator.generate(request) for delta in some]
        assert deltas[-1].finish_reason == "length" and deltas[0].prompt is not None
        assert deltas[0].prompt.tier == "hub"
    assert num_located == 4


def write_huggingtweets(folder: Path, *, sampling: dict[str, Any]) -> Path:
    """What huggingtweets' notebook pushed with transformers 4.3: no generation_config.json, no tokenizer.json."""
    write_old_checkpoint(folder, seed=7, n_positions=64)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    for key in ("dtype", "tie_word_embeddings"):
        del config[key]
    config |= {"gradient_checkpointing": False, "initializer_range": 0.02, "n_ctx": 64, "summary_activation": None}
    config |= {"summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index"}
    config |= {"task_specific_params": {"text-generation": {"do_sample": True, "prefix": "<|endoftext|>", **sampling}}}
    config |= {"transformers_version": "4.3.2", "use_cache": True}
    (folder / "config.json").write_text(json.dumps(config))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {"model_max_length": 1024, "special_tokens_map_file": None, "name_or_path": "gpt2", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.save({"learning_rate": 1e-4}, folder / "training_args.bin")
    (folder / "README.md").write_text("---\nlanguage: en\ntags:\n- huggingtweets\n---\n")
    return folder


async def collect(generator: LocalGenerator, **asked: Any) -> list[Delta]:
    request = GenerationRequest(prompts=("My dream is",), **asked)
    return [delta async for deltas in generator.generate(request) for delta in deltas]


def text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


async def test_repository_of_2021_answers_slowly_once_then_fast_and_by_its_own_sampling(
    server: FakeHub, generator: LocalGenerator, tmp_path: Path
) -> None:
    # With top_k 1 the model's own sampling is greedy, and anybody else's is not.
    sampling = {"max_length": 24, "min_length": 10, "temperature": 1.0, "top_k": 1}
    repo = write_huggingtweets(tmp_path / "repo", sampling=sampling)
    sha = server.add(SOLAR, repo, tags=["gpt2", "huggingtweets"])

    started = time.monotonic()
    first = await collect(generator, model_id=SOLAR, seed=1)
    first_s, num_requests = time.monotonic() - started, server.num_requests()
    again = [await collect(generator, model_id=SOLAR, seed=seed) for seed in (2, 3)]
    again_s = (time.monotonic() - started - first_s) / 2

    assert first[0].prompt and (first[0].prompt.tier, first[0].prompt.revision) == ("hub", sha)
    assert again[0][0].prompt and again[0][0].prompt.tier == "device"
    assert first[0].prompt.load_s > 10 * again[0][0].prompt.load_s and first_s > 3 * again_s
    assert server.num_requests() == num_requests
    assert "training_args.bin" not in {seen.path.rsplit("/", 1)[1] for seen in server.requests}

    model: Any = AutoModelForCausalLM.from_pretrained(write_tiny_gpt2(tmp_path / "same", seed=7))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "same")
    ids = torch.tensor([[END_OF_TEXT, *tokenizer("My dream is").input_ids]])
    with torch.inference_mode():
        whole = model.generate(ids, do_sample=False, max_length=24, min_length=10, pad_token_id=0)[0]
    assert first[0].prompt.num_tokens == ids.shape[1], "the model's own prefix is missing"
    expected = tokenizer.decode(whole[ids.shape[1] :], skip_special_tokens=True)
    assert [text(deltas) for deltas in (first, *again)] == [expected] * 3


async def test_model_that_made_room_comes_back_when_it_is_asked_for(
    server: FakeHub, settings: Settings, generator: LocalGenerator, tmp_path: Path
) -> None:
    server.add("x/a", write_tiny_gpt2(tmp_path / "a", seed=1))
    asked: dict[str, Any] = {"model_id": "x/a", "sampling": {"temperature": 0, "max_new_tokens": 8}}
    before = await collect(generator, **asked)
    store = open_store(settings)
    (fetched,) = store.fetched()
    assert store.drop_revision(fetched.model_id, fetched.revision)
    assert text(await collect(generator, **asked)) == text(before)
    await generator.forget("x/a")  # from memory, as others need the place
    assert text(await collect(generator, **asked)) == text(before)


async def test_stranger_gets_nothing_of_a_private_model(server: FakeHub, settings: Settings, tmp_path: Path) -> None:
    server.add("x/a", write_tiny_gpt2(tmp_path / "a"), private=True)
    generator = LocalGenerator(replace(settings, hub_token="hf_secret"))
    asked: dict[str, Any] = {"model_id": "x/a", "sampling": {"max_new_tokens": 2}}
    for _ in range(2):
        with pytest.raises(ModelNotFound):
            await collect(generator, viewer=EVERYBODY, **asked)
        assert await collect(generator, **asked)
    await generator.close()
