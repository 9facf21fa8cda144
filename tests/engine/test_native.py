"""The compiled library: every weight format, odd sizes, every type of file, and crowded cores."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from loadtest.engine.precision import compare, texts_of
from serve.engine.backend import Span
from serve.engine.native.backend import HUGE_PAGE, NativeBackend, _Place, slot_bytes
from serve.engine.native.draw import NOT_FINITE, UNDECIDED, Draw, draw
from serve.engine.native.library import is_supported
from serve.shape import GPT2Shape, canonical_name
from serve.store.opening import EMBEDDED
from tests.engine.harness import resident_bytes

HAS_AVX512 = "avx512bw" in Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else False
IS_DUE = HAS_AVX512 and shutil.which("c++") is not None
pytestmark = pytest.mark.skipif(not (is_supported("float32") or IS_DUE), reason="no AVX-512, or no C++ compiler")

FORMATS = [weights for weights in ("float32", "bfloat16", "int8") if is_supported(weights)]
# What rounding may do to a logit of a model whose logits have a deviation of about 1.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.06, "int8": 0.25}
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"vocab_size": 101, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4},
    "nothing is a multiple of a vector": {
        "vocab_size": 333, "n_positions": 48, "n_embd": 57, "n_layer": 2, "n_head": 3, "n_inner": 77,
        "activation_function": "gelu",
    },
    "one wide head": {"vocab_size": 500, "n_positions": 64, "n_embd": 160, "n_layer": 2, "n_head": 1},
    "scaled by layer": {
        "vocab_size": 1000, "n_positions": 128, "n_embd": 192, "n_layer": 3, "n_head": 3,
        "scale_attn_by_inverse_layer_idx": True,
    },
}  # fmt: skip


def model(config: GPT2Config, seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    made = GPT2LMHeadModel(config).eval()
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # else biases are 0 and layer norms 1
    return made


def tensors_of(made: GPT2LMHeadModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {known: t.to(dtype) for name, t in made.state_dict().items() if (known := canonical_name(name))}


@torch.inference_mode()
def reference(made: GPT2LMHeadModel, dtype: torch.dtype, ids: list[int]) -> torch.Tensor:
    """transformers' float32 logits with the weights as a file of `dtype` has them."""
    state = {name: t.to(dtype).float() for name, t in made.state_dict().items()}
    rounded = GPT2LMHeadModel(made.config).eval()
    rounded.load_state_dict(state)
    logits: torch.Tensor = rounded(torch.tensor([ids])).logits[0]
    return logits


def test_the_library_is_there_where_it_can_be_built() -> None:
    assert is_supported("float32"), "pip's output (make install) says why the extension was not compiled"


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_transformers_own_up_to_the_format(
    shape: str, tied: bool, weights: str, source: torch.dtype
) -> None:
    """Three models, four ragged texts, a prompt in two chunks, and a text of which only the last logits are wanted."""
    config = GPT2Config(**SHAPES[shape], bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied)
    models = [model(config, seed) for seed in range(3)]
    backend = NativeBackend(GPT2Shape.from_config(config.to_dict()), 4, 6, weights, tied=tied)
    for made in models:
        backend.write(backend.acquire(), tensors_of(made, source))
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, config.vocab_size, (n,), generator=generator).tolist() for n in (20, 6, 33, 11)]
    owners = [0, 0, 1, 2]
    backend.forward([Span(owners[i], i + 1, 0, texts[i][:5], wants_logits=False) for i in range(4)])
    logits = backend.forward([Span(owners[i], i + 1, 5, texts[i][5:], wants_all_logits=i != 2) for i in range(4)])
    start = 0
    for i in range(4):
        expected = reference(models[owners[i]], source, texts[i])[5:]
        if i == 2:
            expected = expected[-1:]
        got = logits[start : start + len(expected)]
        start += len(expected)
        assert (got - expected).abs().max() < TOLERANCE[weights]
    assert start == len(logits)


@pytest.mark.parametrize("weights", FORMATS)
def test_any_number_of_rows_of_a_model_gives_the_same_logits(weights: str) -> None:
    """Up to 40 rows go through kernels of 1 to 8 rows; each row must come out as it does alone, to the bit."""
    config = GPT2Config(**SHAPES["scaled by layer"], bos_token_id=0, eos_token_id=0)
    backend = NativeBackend(GPT2Shape.from_config(config.to_dict()), 1, 40, weights, tied=True)
    slot = backend.acquire()
    backend.write(slot, tensors_of(model(config, 0), torch.float32))
    alone = torch.cat([backend.forward([Span(slot, row, 0, [row])]).clone() for row in range(40)])
    for count in range(1, 41):
        together = backend.forward([Span(slot, row, 0, [row]) for row in range(count)])
        assert torch.equal(together, alone[:count])


@pytest.mark.parametrize("weights", FORMATS)
def test_a_model_that_is_not_finite_spoils_only_its_own_rows(weights: str) -> None:
    config = GPT2Config(**SHAPES["small"], bos_token_id=0, eos_token_id=0)
    backend = NativeBackend(GPT2Shape.from_config(config.to_dict()), 2, 2, weights, tied=True)
    sound, broken = tensors_of(model(config, 0), torch.float32), tensors_of(model(config, 1), torch.float32)
    broken["h.1.mlp.c_fc.weight"][3, 5] = float("nan")
    for tensors in (sound, broken):
        backend.write(backend.acquire(), tensors)
    clean = backend.forward([Span(0, 0, 0, [1, 2, 3])]).clone()
    both = backend.forward([Span(0, 0, 0, [1, 2, 3]), Span(1, 1, 0, [1, 2, 3])])
    assert torch.equal(both[0], clean[0])
    assert not torch.isfinite(both[1]).all()
    assert torch.equal(backend.forward([Span(0, 1, 0, [1, 2, 3])]), clean)  # the broken one's cache row, used again


def test_a_freed_slot_s_memory_serves_the_next_model() -> None:
    shape = GPT2Shape(vocab_size=20_000, n_positions=64, n_embd=512, n_layer=4, n_head=8, n_inner=2048)
    tensors = {name: torch.zeros(size) for name, size in shape.tensor_shapes().items()}
    backend = NativeBackend(shape, 4, 1, "float32", tied=True)
    one_model = slot_bytes(shape, "float32", tied=True)
    before = resident_bytes()
    for _ in range(12):
        slot = backend.acquire()
        backend.write(slot, tensors)
        backend.clear(slot)
    # One in use, one made ready beside it, a huge page each of slack.
    assert resident_bytes() - before < 2 * (one_model + HUGE_PAGE) + (16 << 20)


def test_a_place_is_ready_before_the_next_model_comes() -> None:
    shape = GPT2Shape(vocab_size=3_000, n_positions=64, n_embd=512, n_layer=4, n_head=8, n_inner=2048)
    tensors = {name: torch.zeros(size) for name, size in shape.tensor_shapes().items()}
    backend = NativeBackend(shape, 4, 1, "float32", tied=True)
    backend.write(backend.acquire(), tensors)
    for thread in threading.enumerate():
        if thread.name == "place":
            thread.join()
    size = slot_bytes(shape, "float32", tied=True)
    assert size in _Place._spare


def test_int8_costs_less_than_a_percent_of_perplexity() -> None:
    """On a trained model and people's posts; bfloat16 costs nothing that shows."""
    folder = EMBEDDED["fledgling"]
    archives = sorted((Path(__file__).parents[2] / "deployments" / "archives").glob("*.zip"))
    found = compare(folder, texts_of(folder, archives)[::10])
    for weights, cost, agreement in (("bfloat16", 0.002, 0.98), ("int8", 0.01, 0.96)):
        if is_supported(weights):
            assert abs(found[weights]["perplexity"] / found["float32"]["perplexity"] - 1) < cost
            assert found[weights]["agreement"] > agreement


@pytest.mark.parametrize("vocab", [1, 5, 255, 256, 257, 1000, 50_257])
def test_greedy_takes_the_first_of_the_likeliest_that_is_allowed(vocab: int) -> None:
    logits = torch.randn(40, vocab, generator=torch.Generator().manual_seed(vocab)).mul(2).round()  # with ties
    best = [int((row == row.max()).nonzero()[0]) for row in logits]
    draws = draw(logits, [Draw([0.5], 0, 1)] * 40)
    assert [token for token, _ in draws] == best
    expected = logits.log_softmax(-1)[torch.arange(40), torch.tensor(best)]
    torch.testing.assert_close(torch.tensor([logprob for _, logprob in draws]), expected, atol=3e-5, rtol=0)
    if vocab > 5:
        others = draw(logits, [Draw([0.5], 0, 1, banned=token) for token in best])
        for row, (token, _), forbidden in zip(logits, others, best, strict=True):
            row[forbidden] = -1e9
            assert token == int((row == row.max()).nonzero()[0])


def test_extreme_draws_stay_within_the_tokens_that_have_mass() -> None:
    logits = torch.full((1, 1000), -1e4)
    logits[0, [700, 900]] = 3.0
    below_one = 1 - 2**-53
    assert [draw(logits, [Draw([u], 1, 1)])[0][0] for u in (0.0, 0.49, 0.51, below_one)] == [700, 700, 900, 900]
    assert draw(logits, [Draw([below_one], 1, 1, banned=900)])[0][0] == 700


def test_a_banned_token_far_above_all_others_leaves_their_distribution_as_it_is() -> None:
    """Relative to it every other mass would be 0; ten equal tokens must come in equal parts (chi-square, 1 - 1e-6)."""
    logits = torch.full((1, 1000), -50.0)
    logits[0, 300:310] = 0.0
    logits[0, 307] = 11.0
    draws = 9000
    counts = torch.zeros(1000)
    for i in range(draws):
        counts[draw(logits, [Draw([(i + 0.5) / draws], 0.1, 1.0, banned=307)])[0][0]] += 1
    assert counts[307] == 0
    wanted = torch.tensor([float(i != 307) for i in range(300, 310)]) * draws / 9
    assert torch.allclose(counts[300:310], wanted, atol=2)


def test_a_banned_token_beyond_the_vocabulary_is_nobody() -> None:
    for vocab in (1, 256, 768):
        logits = torch.zeros(1, vocab)
        for temperature in (0.0, 1.0):
            assert 0 <= draw(logits, [Draw([0.5], temperature, 0.9, banned=vocab)])[0][0] < vocab
    assert draw(torch.zeros(1, 1), [Draw([0.5], 0, 1, banned=0)])[0][0] == 0


@pytest.mark.parametrize("size", [1e5, 3e5, 1e8, 1e15])
def test_activations_of_any_size_come_out_as_transformers_has_them(size: float) -> None:
    config = GPT2Config(**SHAPES["small"], bos_token_id=0, eos_token_id=0)
    made = model(config, 0)
    made.transformer.h[1].mlp.c_fc.bias.data[:] = size
    backend = NativeBackend(GPT2Shape.from_config(config.to_dict()), 1, 1, "float32", tied=True)
    backend.write(backend.acquire(), tensors_of(made, torch.float32))
    got = backend.forward([Span(0, 0, 0, [1, 2, 3], wants_all_logits=True)])
    torch.testing.assert_close(got, reference(made, torch.float32, [1, 2, 3]), atol=1e-3, rtol=1e-3)


def test_a_row_without_a_draw_in_the_nucleus_says_so() -> None:
    logits = torch.tensor([[4.0, 0.0, 0.0, 0.0]])
    assert draw(logits, [Draw([0.999, 0.998], 1, 0.5)])[0][0] == UNDECIDED
    assert draw(logits, [Draw([0.999, 0.001], 1, 0.5)])[0][0] == 0


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 1e31])
@pytest.mark.parametrize("place", [0, 15, 16, 998, 999])
def test_a_number_that_is_not_finite_is_found_wherever_it_is(poison: float, place: int) -> None:
    logits = torch.zeros(2, 999 + 1)
    logits[1, place] = poison
    tokens = [token for token, _ in draw(logits, [Draw([0.5], 1, 0.9)] * 2)]
    assert tokens[0] >= 0 and tokens[1] == NOT_FINITE


EXITING = """
import threading, torch
from transformers import GPT2Config
from tests.engine.test_native import SHAPES, model, tensors_of
from serve.engine.backend import Span
from serve.engine.native.backend import NativeBackend
from serve.shape import GPT2Shape
config = GPT2Config(**SHAPES["scaled by layer"], bos_token_id=0, eos_token_id=0)
backend = NativeBackend(GPT2Shape.from_config(config.to_dict()), 1, 8, "float32", tied=True)
backend.write(backend.acquire(), tensors_of(model(config, 0), torch.float32))
started = threading.Event()
def step():
    while True:
        backend.forward([Span(0, row, 0, list(range(100))) for row in range(8)])
        started.set()
threading.Thread(target=step, daemon=True).start()
started.wait()
"""


def test_a_program_that_ends_amid_a_step_ends_well() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", EXITING], cwd=root, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


CROWDED = """
import torch
torch.set_num_threads(16)  # many times the cores: members lose theirs amid a step, again and again
from transformers import GPT2Config
from tests.engine.test_native import SHAPES, model, tensors_of
from serve.engine.backend import Span
from serve.engine.native.backend import NativeBackend
from serve.shape import GPT2Shape
config = GPT2Config(**SHAPES["scaled by layer"], bos_token_id=0, eos_token_id=0)
backend = NativeBackend(GPT2Shape.from_config(config.to_dict()), 1, 8, "float32", tied=True)
slot = backend.acquire()
backend.write(slot, tensors_of(model(config, 0), torch.float32))
spans = [Span(slot, row, 0, list(range(row + 1))) for row in range(8)]
first = backend.forward(spans).clone()
assert all(torch.equal(backend.forward(spans), first) for _ in range(200))
print("same")
"""


def test_a_team_larger_than_the_machine_neither_hangs_nor_errs() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", CROWDED], cwd=root, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.strip() == "same", done.stderr[-2000:]
