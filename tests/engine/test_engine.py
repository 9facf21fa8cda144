"""The engine against transformers: float32, greedy, token for token, in batches that mix models."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from serve.engine.backend import Backend, Span
from serve.engine.engine import EngineConfig
from serve.engine.selection import build_backend
from serve.engine.sequence import Sequence
from serve.shape import GPT2Shape
from serve.types import SamplingParams
from tests.engine.harness import GREEDY, Collected, Harness, grouped_backend, read_tensors, resident_bytes
from tests.fakes.models import VOCAB_SIZE, tiny_config, write_tiny_gpt2

NUM_MODELS = 6


@pytest.fixture(scope="module", params=[build_backend, grouped_backend])
def harness(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Harness]:
    """With the backend that serves this machine, and with that of devices."""
    config = EngineConfig(budget_bytes=16 << 20)
    harness = Harness(tmp_path_factory.mktemp("models"), NUM_MODELS, config, build=request.param)
    yield harness
    harness.engine.close()


@pytest.fixture(scope="module")
def references(harness: Harness) -> list[Any]:
    return [harness.reference(i) for i in range(NUM_MODELS)]


def random_prompts(count: int, seed: int, longest: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """transformers' own greedy continuation, recomputed from the whole text at each token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_ragged_batches_of_six_models_match_transformers_token_for_token(
    harness: Harness, references: list[Any]
) -> None:
    prompts = random_prompts(24, seed=1)
    work = [(i % NUM_MODELS, harness.sequence(i % NUM_MODELS, prompt)) for i, prompt in enumerate(prompts)]
    results = harness.run(work)
    for (model, _), prompt, got in zip(work, prompts, results, strict=True):
        assert got.ids == greedy(references[model], prompt, GREEDY.max_new_tokens)


def test_sequences_that_join_and_leave_do_not_disturb_the_others(harness: Harness, references: list[Any]) -> None:
    rng = random.Random(2)
    prompts = random_prompts(30, seed=3, longest=30)
    jobs: list[tuple[int, list[int], int, Collected]] = []
    for i, prompt in enumerate(prompts):
        model, count = i % NUM_MODELS, rng.randrange(1, 30)
        params = SamplingParams(temperature=0, max_new_tokens=count, ignore_eos=True)
        jobs.append((model, prompt, count, harness.submit(model, harness.sequence(model, prompt, params))))
        if i % 3 == 0:  # let some steps pass, so that later ones join a running batch
            harness.wait_tokens(jobs[-1][3], min(count, 3))
    harness.wait([job[3] for job in jobs])
    for model, prompt, count, got in jobs:
        assert got.ids == greedy(references[model], prompt, count)


def test_a_prompt_longer_than_a_step_is_prefilled_in_chunks(tmp_path: Path) -> None:
    harness = Harness(tmp_path, 2, EngineConfig(max_step_rows=8))
    prompts = random_prompts(6, seed=4, longest=45)
    work = [(i % 2, harness.sequence(i % 2, prompt)) for i, prompt in enumerate(prompts)]
    for (model, _), prompt, got in zip(work, prompts, harness.run(work), strict=True):
        assert got.ids == greedy(harness.reference(model), prompt, GREEDY.max_new_tokens)
    harness.engine.close()


def test_more_sequences_than_rows_wait_their_turn(tmp_path: Path) -> None:
    harness = Harness(tmp_path, 1, EngineConfig(max_sequences=3))
    prompts = random_prompts(11, seed=5)
    results = harness.run([(0, harness.sequence(0, prompt)) for prompt in prompts])
    reference = harness.reference(0)
    assert [r.ids for r in results] == [greedy(reference, p, GREEDY.max_new_tokens) for p in prompts]
    harness.engine.close()


def test_a_cancelled_sequence_ends_at_once_and_the_rest_go_on(harness: Harness, references: list[Any]) -> None:
    long = SamplingParams(temperature=0, max_new_tokens=50, ignore_eos=True)
    doomed = harness.sequence(0, [1, 2, 3], long)
    kept = harness.sequence(1, [4, 5, 6], long)
    cancelled, survivor = harness.submit(0, doomed), harness.submit(1, kept)
    harness.wait_tokens(cancelled, 1)
    harness.engine.cancel([doomed])
    harness.wait([cancelled, survivor])
    assert cancelled.last is not None and (cancelled.last.cancelled or len(cancelled.ids) == 50)
    assert survivor.ids == greedy(references[1], [4, 5, 6], 50)


def test_prompt_logprobs_are_the_model_s_own(harness: Harness, references: list[Any]) -> None:
    prompt = random_prompts(1, seed=6)[0] + [7, 8]
    (got,) = harness.run([(2, harness.sequence(2, prompt, prompt_logprobs=True, top_logprobs=3))])
    with torch.inference_mode():
        expected = references[2](torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert [t.id for t in got.prompt] == prompt
    assert got.prompt[0].logprob is None
    for position, token in enumerate(got.prompt[1:]):
        assert token.logprob == pytest.approx(float(expected[position, token.id]), abs=1e-4)
        assert [t[0] for t in token.top] == expected[position].topk(3).indices.tolist()


def test_a_model_with_nan_weights_fails_alone(tmp_path: Path) -> None:
    harness = Harness(tmp_path, 3)
    tensors = read_tensors(harness.folders[0])
    tensors["ln_f.weight"] = torch.full_like(tensors["ln_f.weight"], float("nan"))
    broken = harness.engine.load(harness.layout, tensors)
    prompt = [1, 2, 3]
    bad = Sequence(slot=broken.index, prompt_ids=prompt, params=GREEDY, vocabulary=harness.vocabulary)
    bad_result = harness.collected[bad] = Collected()
    good = [harness.submit(i, harness.sequence(i, prompt)) for i in range(3)]
    harness.engine.submit(broken, [bad])
    harness.wait([*good, bad_result])
    assert bad_result.last is not None and bad_result.last.error is not None and "NaN" in bad_result.last.error.message
    for i in range(3):
        assert good[i].ids == greedy(harness.reference(i), prompt, GREEDY.max_new_tokens)
    harness.engine.close()


def test_a_row_of_the_cache_is_clean_after_a_model_with_nan_used_it(tmp_path: Path) -> None:
    harness = Harness(tmp_path, 1, EngineConfig(max_sequences=1))
    tensors = read_tensors(harness.folders[0])
    tensors["h.0.attn.c_attn.bias"] = torch.full_like(tensors["h.0.attn.c_attn.bias"], float("nan"))
    broken = harness.engine.load(harness.layout, tensors)
    bad = Sequence(slot=broken.index, prompt_ids=range(30), params=GREEDY, vocabulary=harness.vocabulary)
    bad_result = harness.collected[bad] = Collected()
    harness.engine.submit(broken, [bad])
    good = [harness.submit(0, harness.sequence(0, prompt)) for prompt in ([1, 2, 3], [4])]
    harness.wait([bad_result, *good])
    assert bad_result.last is not None and bad_result.last.error is not None
    assert [g.ids for g in good] == [greedy(harness.reference(0), prompt, 12) for prompt in ([1, 2, 3], [4])]
    harness.engine.close()


def test_a_sampled_text_is_the_same_alone_and_in_company(harness: Harness) -> None:
    params = SamplingParams(top_p=0.9, max_new_tokens=20, ignore_eos=True)
    (alone,) = harness.run([(3, harness.sequence(3, [9, 8, 7], params, seed=42, choice=1))])
    company = [(i % NUM_MODELS, harness.sequence(i % NUM_MODELS, p, params, seed=i))
               for i, p in enumerate(random_prompts(12, seed=8))]  # fmt: skip
    together = harness.run([(3, harness.sequence(3, [9, 8, 7], params, seed=42, choice=1)), *company])[0]
    other_choice = harness.run([(3, harness.sequence(3, [9, 8, 7], params, seed=42, choice=2))])[0]
    assert together.ids == alone.ids
    assert other_choice.ids != alone.ids  # by chance equal with odds far below 1e-10


def test_a_freed_slot_is_used_again_by_another_model(tmp_path: Path) -> None:
    harness = Harness(tmp_path, 2)
    first = harness.slots[0]
    harness.engine.unload(first)
    other = write_tiny_gpt2(tmp_path / "other", seed=99)
    harness.slots[0] = harness.engine.load(harness.layout, read_tensors(other))
    assert harness.slots[0].index == first.index
    harness.folders[0] = other
    (got,) = harness.run([(0, harness.sequence(0, [5, 6]))])
    assert got.ids == greedy(harness.reference(0), [5, 6], GREEDY.max_new_tokens)
    harness.engine.close()


@pytest.mark.parametrize("build", [build_backend, grouped_backend])
@pytest.mark.parametrize("tie", [True, False])
def test_logits_of_a_mixed_ragged_step_are_within_1e4_of_transformers(
    tmp_path: Path, build: Callable[..., Backend], tie: bool
) -> None:
    shape = GPT2Shape.from_config(tiny_config(tie=tie))
    backend = build(shape, 8, 16, "float32", torch.device("cpu"), tied=tie)
    models: dict[int, Any] = {}
    for seed in range(5):
        folder = write_tiny_gpt2(tmp_path / str(seed), seed=seed, tie=tie)
        slot = backend.acquire()
        backend.write(slot, read_tensors(folder))
        models[slot] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = random_prompts(10, seed=9)
    # A second step on top of the cache: one token for some, three for others; a third: one for all.
    texts: list[list[int]] = [[] for _ in prompts]
    for tails in (prompts, [[11], [12, 13, 14]] * 5, [[15]] * 10):
        spans = [
            Span(i // 2, i, len(text), tail, wants_all_logits=True)
            for i, (text, tail) in enumerate(zip(texts, tails, strict=True))
        ]
        logits = backend.forward(spans)
        first = 0
        for i, tail in enumerate(tails):
            texts[i] = texts[i] + tail
            with torch.inference_mode():
                expected = models[i // 2](torch.tensor([texts[i]])).logits[0, -len(tail) :]
            torch.testing.assert_close(logits[first : first + len(tail)], expected, atol=1e-4, rtol=0)
            first += len(tail)
        assert first == len(logits)


@pytest.mark.parametrize("build", [build_backend, grouped_backend])
def test_a_cache_costs_no_memory_before_it_is_used(build: Callable[..., Backend]) -> None:
    before = resident_bytes()
    backend = build(GPT2Shape(50_257, 1024, 768, 12, 12, 3072), 1, 64, "float32", torch.device("cpu"), tied=True)
    assert resident_bytes() - before < 64 << 20  # of 4.8 GB
    del backend


def test_a_listener_that_fails_does_not_stop_the_engine(tmp_path: Path) -> None:
    harness = Harness(tmp_path, 1)

    def fail(stats: object) -> None:
        raise RuntimeError("a listener's own fault")

    harness.engine._on_step = fail
    for _ in range(2):
        (got,) = harness.run([(0, harness.sequence(0, [1, 2]))])
        assert len(got.ids) == GREEDY.max_new_tokens
    assert harness.engine.is_alive
    harness.engine.close()
    assert not harness.engine.is_alive
