"""The path of devices, run on a CPU: padding, buckets, static buffers, swaps between steps, uploads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from serve.engine.backend import Span
from serve.engine.engine import Engine, EngineConfig, Layout, lane_sizes
from serve.engine.grouped import upload
from serve.engine.grouped.backend import GroupedBackend
from serve.engine.grouped.batch import Batch, StepSize
from serve.engine.grouped.upload import Uploader
from serve.engine.grouped.weights import slot_bytes
from serve.engine.selection import check_weights
from serve.errors import ModelTooLarge
from serve.settings import BadSetting
from serve.shape import GPT2Shape
from tests.engine.harness import grouped_backend, read_tensors, resident_bytes
from tests.fakes.models import VOCAB_SIZE, tiny_config, write_tiny_gpt2

CPU = torch.device("cpu")
NUM_SLOTS, KV_ROWS, POSITIONS = 6, 24, 256
GPT2_SMALL = GPT2Shape(50_257, 1024, 768, 12, 12, 3072)


class Rig:
    """A backend with four tiny models, and their transformers twins."""

    def __init__(self, folder: Path, **shape: Any) -> None:
        shape = {"n_positions": POSITIONS} | shape
        self.shape = GPT2Shape.from_config(tiny_config(**shape))
        self.backend = grouped_backend(self.shape, NUM_SLOTS, KV_ROWS, "float32", CPU, tied=True)
        self.folders = [write_tiny_gpt2(folder / str(seed), seed=seed, **shape) for seed in range(4)]
        self.models = [AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in self.folders]
        for path in self.folders:
            self.backend.write(self.backend.acquire(), read_tensors(path))

    @torch.inference_mode()
    def expected(self, model: int, text: list[int]) -> torch.Tensor:
        logits: torch.Tensor = self.models[model](torch.tensor([text])).logits[0, -1]
        return logits

    def prefill(self, texts: dict[int, tuple[int, list[int]]]) -> None:
        """`texts`: KV cache row -> (model, tokens)."""
        ordered = sorted(texts.items(), key=lambda item: item[1][0])
        self.backend.forward([Span(model, row, 0, text) for row, (model, text) in ordered])

    def step(self, texts: dict[int, tuple[int, list[int]]], token: int) -> None:
        """Append `token` to every text, and check the logits of all."""
        ordered = sorted(texts.items(), key=lambda item: item[1][0])
        logits = self.backend.forward([Span(model, row, len(text), [token]) for row, (model, text) in ordered])
        assert logits.shape == (len(texts), VOCAB_SIZE)
        for got, (row, (model, text)) in zip(logits, ordered, strict=True):
            texts[row] = (model, [*text, token])
            torch.testing.assert_close(got, self.expected(model, texts[row][1]), atol=1e-4, rtol=0)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def spans_of(rows: list[int], slots: list[int], past: list[int]) -> list[Span]:
    return [Span(slot, row, length, [7]) for row, slot, length in zip(rows, sorted(slots), past, strict=True)]


@st.composite
def decode_steps(draw: st.DrawFn) -> list[Span]:
    rows = draw(st.lists(st.integers(0, KV_ROWS - 1), min_size=1, max_size=KV_ROWS, unique=True))
    slots = draw(st.lists(st.integers(0, NUM_SLOTS - 1), min_size=len(rows), max_size=len(rows)))
    past = draw(st.lists(st.integers(0, POSITIONS - 1), min_size=len(rows), max_size=len(rows)))
    return spans_of(rows, slots, past)


@given(decode_steps())
@settings(max_examples=200)
def test_a_padded_batch_says_of_every_row_what_its_span_says(spans: list[Span]) -> None:
    size = StepSize.padded(spans, KV_ROWS, POSITIONS)
    assert len(spans) <= size.rows <= size.cache_rows <= KV_ROWS
    assert size.rows < 2 * len(spans) and size.cache_rows > max(span.kv_row for span in spans)
    assert max(span.past for span in spans) < size.length <= POSITIONS
    batch = Batch.empty(size, NUM_SLOTS, CPU)
    batch.fill(spans)
    for row in range(size.rows):
        span = spans[min(row, len(spans) - 1)]  # padding repeats the last row
        assert int(batch.token_ids[row]) == 7 and int(batch.positions[row]) == span.past
        assert int(batch.kv_rows[row]) == span.kv_row and int(batch.row_slots[row]) == span.slot
        assert int(batch.ends[span.slot]) > row and (span.slot == 0 or int(batch.ends[span.slot - 1]) <= row)
    assert int(batch.ends[-1]) == size.rows
    lengths = dict.fromkeys(range(size.cache_rows), 1) | {span.kv_row: span.past + 1 for span in spans}
    assert batch.lengths.tolist() == list(lengths.values())
    for row, span in enumerate(spans):
        assert int(batch.queries[span.kv_row]) == row


def test_there_are_few_sizes_of_steps() -> None:
    sizes = {
        StepSize.padded([Span(0, row, past, [1]) for row in range(count)], 256, 1024)
        for count in range(1, 257)
        for past in range(0, 1024, 31)
    }
    assert len(sizes) == 9 * 5  # 1, 2, 4 .. 256 rows; 64, 128 .. 1024 positions


def test_padding_stores_nothing_but_what_the_last_row_stores(rig: Rig) -> None:
    texts = {row: (row // 2, tokens(5, seed=row)) for row in range(5)}
    rig.prefill(texts)
    cache = rig.backend._cache
    keys, values = cache._keys.clone(), cache._values.clone()
    rig.step(texts, 3)  # 5 rows, padded to 8
    keys[:, :5, :, 5], values[:, :5, :, 5] = cache._keys[:, :5, :, 5], cache._values[:, :5, :, 5]
    assert torch.equal(keys, cache._keys) and torch.equal(values, cache._values)


def test_rows_of_the_cache_in_any_order_with_gaps_match_transformers(rig: Rig) -> None:
    texts = {row: (model, tokens(4 + row, seed=row)) for model, row in ((0, 20), (0, 3), (1, 9), (3, 0), (3, 15))}
    rig.prefill(texts)
    for token in (1, 2, 3):
        rig.step(texts, token)
    del texts[20]
    rig.step(texts, 4)  # a smaller bucket, with another sequence's keys among its rows
    texts[21] = (2, [])
    rig.step(texts, 5)  # a prompt of one token


def test_texts_that_grow_over_the_borders_of_length_buckets_match_transformers(rig: Rig) -> None:
    texts = {0: (0, tokens(61, seed=1)), 1: (1, tokens(125, seed=2)), 2: (2, tokens(3, seed=3))}
    rig.prefill(texts)
    for token in range(5):  # 62 .. 66 and 126 .. 130 tokens
        rig.step(texts, token)


def test_prompts_of_many_lengths_in_chunks_beside_decoding_rows_match_transformers(rig: Rig) -> None:
    lengths = {0: 150, 1: 2, 2: 3, 3: 70, 4: 90, 5: 17, 6: 1, 7: 33}
    whole = {row: tokens(length, seed=row) for row, length in lengths.items()}
    texts: dict[int, list[int]] = {row: [] for row in whole}
    chunk = 29
    while any(len(texts[row]) < len(whole[row]) for row in whole):
        spans = []
        for row, text in texts.items():
            more = whole[row][len(text) : len(text) + chunk] or [row]  # then it decodes
            spans.append(Span(row // 2, row, len(text), more, wants_all_logits=row == 3))
            texts[row] = text + more
            if len(texts[row]) > len(whole[row]):
                whole[row] = texts[row]
        logits = rig.backend.forward(spans)
        at = -1
        for row, span in enumerate(spans):
            at += len(span.token_ids) if span.wants_all_logits else 1
            torch.testing.assert_close(logits[at], rig.expected(row // 2, texts[row]), atol=1e-4, rtol=0)
        assert at == len(logits) - 1


def test_a_text_that_fills_the_context_matches_transformers(rig: Rig) -> None:
    texts = {4: (1, tokens(POSITIONS - 2, seed=1))}
    rig.prefill(texts)
    rig.step(texts, 5)
    rig.step(texts, 6)


def test_steps_use_the_same_buffers_again_and_see_weights_that_were_swapped(rig: Rig) -> None:
    texts = {0: (0, tokens(6, seed=1)), 1: (1, tokens(4, seed=2)), 2: (2, tokens(9, seed=3))}
    rig.prefill(texts)
    rig.step(texts, 1)
    inputs = {size: batch.buffer.data_ptr() for size, batch in rig.backend._decode._inputs.items()}
    weights = rig.backend._slab._memory.data_ptr()
    # Model 1 leaves, model 3's weights come in its place, while the others' texts go on.
    rig.backend.forget(1, len(texts.pop(1)[1]))
    rig.backend.clear(1)
    assert rig.backend.acquire() == 1
    rig.backend.write(1, read_tensors(rig.folders[3]))
    rig.models[1] = rig.models[3]
    texts[1] = (1, [])
    rig.step(texts, 2)
    rig.step(texts, 3)
    assert {size: batch.buffer.data_ptr() for size, batch in rig.backend._decode._inputs.items()} == inputs
    assert rig.backend._slab._memory.data_ptr() == weights


def test_only_the_wanted_logits_of_a_decode_step_come_back(rig: Rig) -> None:
    spans = [Span(0, 0, 0, [5]), Span(1, 1, 0, [6], wants_logits=False), Span(2, 2, 0, [7], wants_all_logits=True)]
    logits = rig.backend.forward(spans)
    assert logits.shape == (2, VOCAB_SIZE)
    torch.testing.assert_close(logits[0], rig.expected(0, [5]), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[1], rig.expected(2, [7]), atol=1e-4, rtol=0)


def test_a_step_of_prompt_chunks_alone_has_no_logits(rig: Rig) -> None:
    assert rig.backend.forward([Span(1, 0, 0, [5, 6, 7], wants_logits=False)]).shape == (0, VOCAB_SIZE)
    rig.step({0: (1, [5, 6, 7])}, 8)


def test_a_nan_stays_in_its_row_and_is_gone_once_the_text_ended(rig: Rig) -> None:
    bad = read_tensors(rig.folders[3])
    bad["h.0.attn.c_attn.bias"] = torch.full_like(bad["h.0.attn.c_attn.bias"], float("nan"))
    rig.backend.write(4, bad)
    # The broken model's row is the last, so padding repeats it.
    for row, slot in ((0, 0), (1, 1), (2, 4)):
        rig.backend.forward([Span(slot, row, 0, tokens(5, seed=row))])
    logits = rig.backend.forward([Span(0, 0, 5, [1]), Span(1, 1, 5, [1]), Span(4, 2, 5, [1])])
    assert logits[2].isnan().all()
    for row in (0, 1):
        torch.testing.assert_close(logits[row], rig.expected(row, [*tokens(5, seed=row), 1]), atol=1e-4, rtol=0)
    rig.backend.forget(2, 6)
    rig.step({2: (2, [])}, 9)


@pytest.mark.parametrize(("n_embd", "n_head"), [(2, 2), (36, 3), (30, 2)])
def test_widths_that_grouped_mm_does_not_take_match_transformers(tmp_path: Path, n_embd: int, n_head: int) -> None:
    rig = Rig(tmp_path, n_embd=n_embd, n_head=n_head)
    texts = {row: (row, tokens(5 + row, seed=row)) for row in range(4)}
    rig.prefill(texts)
    rig.step(texts, 1)


def test_bfloat16_is_close_to_float32_and_the_padded_vocabulary_never_shows(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    backend = GroupedBackend(rig.shape, 4, 4, torch.bfloat16, CPU)
    for folder in rig.folders:
        backend.write(backend.acquire(), read_tensors(folder))
    text = tokens(12, seed=1)
    backend.forward([Span(model, model, 0, text) for model in range(4)])
    logits = backend.forward([Span(model, model, 12, [3]) for model in range(4)])
    expected = torch.stack([rig.expected(model, [*text, 3]) for model in range(4)])
    assert logits.dtype == torch.float32 and logits.shape == expected.shape
    assert torch.nn.functional.cosine_similarity(logits, expected).min() > 0.999


def test_freeing_a_slot_gives_its_memory_back_and_leaves_zeros() -> None:
    shape = GPT2Shape(vocab_size=20_000, n_positions=64, n_embd=512, n_layer=4, n_head=8, n_inner=2048)
    tensors = {name: torch.ones(size) for name, size in shape.tensor_shapes().items()}
    backend = grouped_backend(shape, 8, 1, "float32", CPU, tied=True)
    before = resident_bytes()
    for _ in range(3):
        slots = [backend.acquire() for _ in range(4)]
        for slot in slots:
            backend.write(slot, tensors)
        held = resident_bytes() - before
        for slot in slots:
            backend.clear(slot)
    one_model = 4 * shape.num_parameters
    assert held > 3 * one_model
    assert resident_bytes() - before < one_model
    assert not backend._slab._memory[0].any()


# --- Uploads, as to a device; here both sides are the same memory --------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "PIECE_BYTES", 64)


def parts_of(values: list[float]) -> Iterator[tuple[int, torch.Tensor]]:
    """A vector of 10 and a matrix of 5 x 4 behind a gap, for each value."""
    for i, value in enumerate(values):
        yield 40 * i, torch.full((10,), value)
        yield 40 * i + 16, torch.full((5, 4), value, dtype=torch.float16)


@pytest.mark.usefixtures("small_pieces")
def test_an_upload_puts_every_part_in_its_place() -> None:
    uploader = Uploader(120, torch.float32, CPU)
    target = torch.full((120,), -1.0)
    uploader.upload(target, parts_of([1, 2, 3]))
    for i, value in enumerate((1, 2, 3)):
        got = target[40 * i : 40 * (i + 1)].tolist()
        assert got[:36] == [value] * 10 + [0] * 6 + [value] * 20
    assert target[-4:].tolist() == [-1] * 4  # behind the last part


@pytest.mark.usefixtures("small_pieces")
def test_uploads_of_several_threads_do_not_mix_and_a_failed_one_leaves_its_buffer_to_the_next() -> None:
    uploader = Uploader(400, torch.float32, CPU)
    together = threading.Barrier(3)

    def broken() -> Iterator[tuple[int, torch.Tensor]]:
        yield from parts_of([9])
        raise OSError("the file is gone")

    def work(value: float, targets: list[torch.Tensor]) -> None:
        together.wait()
        for target in targets:
            with pytest.raises(OSError, match="gone"):
                uploader.upload(torch.zeros(400), broken())
            uploader.upload(target, parts_of([value] * 10))

    targets = {value: [torch.zeros(400) for _ in range(50)] for value in (1.0, 2.0, 3.0)}
    threads = [threading.Thread(target=work, args=item) for item in targets.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for value, filled in targets.items():
        for target in filled:
            assert set(target.tolist()) <= {value, 0.0, 9.0}
            assert all((target[s : s + 10] == value).all() for s in range(0, 400, 40))
    assert 1 <= len(uploader._idle) <= 3


# --- What a device's memory is used for -----------------------------------------------------------------------------


def test_a_lane_on_a_device_takes_no_more_than_its_budget_cache_and_padding_included() -> None:
    config = EngineConfig(torch.device("cuda"), "bfloat16", budget_bytes=68 << 30, max_sequences=256)
    num_slots, num_rows, num_bytes = lane_sizes(Layout(GPT2_SMALL), config, budget_bytes=51 << 30)
    each = slot_bytes(GPT2_SMALL, torch.bfloat16, tied=True)
    row = 2 * 12 * 1024 * 768 * 2
    assert 2 * GPT2_SMALL.num_parameters < each < 1.001 * 2 * GPT2_SMALL.num_parameters
    assert num_rows == 256
    assert num_slots * each + num_rows * row == num_bytes <= 51 << 30 < num_bytes + each


def test_int8_on_a_device_is_refused_with_the_setting_s_name() -> None:
    with pytest.raises(BadSetting, match="ROOKERY_DTYPE=int8 is for CPUs"):
        check_weights("int8", torch.device("cuda"))


def test_a_model_that_fits_no_lane_is_refused_with_what_it_needs() -> None:
    config = EngineConfig(torch.device("cuda"), "bfloat16", budget_bytes=1 << 30)
    with pytest.raises(ModelTooLarge, match=r"needs 27\d MiB; 200 MiB are left"):
        lane_sizes(Layout(GPT2_SMALL), config, budget_bytes=200 << 20)


def test_a_device_s_budget_is_full_when_its_slots_are() -> None:
    """Else a pool would never evict, and every further load would fail."""
    config = EngineConfig(torch.device("meta"), "float32", budget_bytes=8 << 20, max_sequences=4)  # as a device would
    shape = GPT2Shape.from_config(tiny_config())
    engine = Engine(config, on_outputs=lambda outputs: None)
    for layout in (Layout(shape), Layout(shape, tied=False)):
        used = 0
        while (used := used + engine.model_bytes(layout)) <= config.budget_bytes:
            engine.load(layout, {name: torch.zeros(size) for name, size in shape.tensor_shapes().items()})
    engine.close()
