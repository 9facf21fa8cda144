from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from serve.training.gpt2 import GPT2, HEAD, Dropout, KVCache, Weights, read_base, write_weights
from serve.training.learner import Learner
from tests.fakes.models import VOCAB_SIZE, write_tiny_gpt2

CPU = torch.device("cpu")


def _reference(folder: Path) -> Any:
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()


def _ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


def _gradients_of(model: Any, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    named = dict(model.named_parameters())
    return float(loss.detach()), {name.removeprefix("transformer."): p.grad for name, p in named.items()}


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("length", [7, 300])  # less and more than a block of queries
def test_loss_and_every_gradient_are_those_of_transformers(tmp_path: Path, tie: bool, length: int) -> None:
    folder = write_tiny_gpt2(tmp_path, n_positions=400, tie=tie)
    base, ids = read_base(folder), _ids(2, length)
    gradients = base.weights.like(torch.full_like(base.weights.flat, 9.0))
    loss = GPT2(base.shape, base.weights).loss_and_gradients(ids, gradients)
    expected, theirs = _gradients_of(_reference(folder), ids)
    assert float(loss) == pytest.approx(expected, abs=1e-5)
    assert gradients.named.keys() == theirs.keys() and (HEAD in theirs) is not tie
    for name, gradient in gradients.named.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-4, msg=name)


def test_bfloat16_gradients_point_where_those_of_float32_do(tmp_path: Path) -> None:
    base = read_base(write_tiny_gpt2(tmp_path))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        gradients = base.weights.like(torch.zeros_like(base.weights.flat))
        model = GPT2(base.shape, base.weights.like(base.weights.flat.detach().to(dtype)))
        model.loss_and_gradients(_ids(2, 40), gradients)
        found.append(gradients.flat)
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.999


def test_logits_are_those_of_transformers_at_once_and_token_by_token(tmp_path: Path) -> None:
    folder = write_tiny_gpt2(tmp_path)
    base, ids = read_base(folder), _ids(3, 20)
    model, cache = GPT2(base.shape, base.weights), KVCache()
    with torch.no_grad():
        expected = _reference(folder)(input_ids=ids).logits
    torch.testing.assert_close(model.logits(ids), expected, atol=1e-4, rtol=1e-4)
    pieces = [model.logits(piece, cache) for piece in (ids[:, :5], *torch.split(ids[:, 5:], 1, 1))]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-4, rtol=1e-4)


def test_a_folder_that_was_read_and_written_holds_the_same_weights(tmp_path: Path) -> None:
    base = read_base(write_tiny_gpt2(tmp_path / "base", dtype=torch.bfloat16))
    write_weights(tmp_path / "out", base, base.weights)
    theirs, ours = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("base", "out"))
    assert theirs == ours


def test_dropout_changes_the_loss_by_torchs_seed_and_keeps_the_mean(tmp_path: Path) -> None:
    base, ids = read_base(write_tiny_gpt2(tmp_path)), _ids(2, 40)
    model, gradients = GPT2(base.shape, base.weights), base.weights.like(torch.zeros_like(base.weights.flat))

    def loss(seed: int, dropout: Dropout) -> float:
        torch.manual_seed(seed)
        return float(model.loss_and_gradients(ids, gradients, dropout))

    for dropout in (Dropout(embedding=0.5), Dropout(residual=0.5), Dropout(attention=0.5)):
        assert loss(1, dropout) == loss(1, dropout) != loss(2, dropout)
    assert loss(1, Dropout()) == loss(2, Dropout())
    slight = Dropout(0.02, 0.02, 0.02)
    mean = sum(loss(seed, slight) for seed in range(40)) / 40
    assert mean == pytest.approx(loss(0, Dropout()), rel=0.05)


def test_gradients_under_dropout_are_those_of_the_same_draw(tmp_path: Path) -> None:
    """By a small step along the gradient: the loss changes as it foretells."""
    base, ids = read_base(write_tiny_gpt2(tmp_path)), _ids(2, 40)
    dropout, gradients = Dropout(0.2, 0.2, 0.2), base.weights.like(torch.zeros_like(base.weights.flat))

    def loss(flat: Tensor) -> float:
        torch.manual_seed(5)
        return float(GPT2(base.shape, base.weights.like(flat)).loss_and_gradients(ids, gradients, dropout))

    flat = base.weights.flat.detach().double()
    loss(flat.float())
    direction = gradients.flat.clone() / gradients.flat.norm()
    slope = float(gradients.flat.norm())
    step = 1e-2
    found = (loss((flat + step * direction).float()) - loss((flat - step * direction).float())) / (2 * step)
    assert found == pytest.approx(slope, rel=0.02)


def test_a_step_is_adamw_on_clipped_gradients(tmp_path: Path) -> None:
    folder = write_tiny_gpt2(tmp_path)
    base, model = read_base(folder), _reference(folder)
    learner = Learner(base.shape, base.weights, CPU, torch.float32, Dropout(), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(3):
        ids = _ids(2, 30, seed=step)
        learner.step(ids, 1e-3)
        _, gradients = _gradients_of(model, ids)
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 1.0, "else this test says nothing of clipping"
        optimizer.param_groups[0]["lr"] = 1e-3
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        if name.endswith("c_attn.bias"):
            continue  # a key's bias moves no loss: its gradient is rounding alone, which Adam makes steps of
        ours = learner.weights.named[name.removeprefix("transformer.")]
        torch.testing.assert_close(ours, parameter, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.gpu
def test_a_device_learns_what_a_processor_does(tmp_path: Path) -> None:
    base = read_base(write_tiny_gpt2(tmp_path, n_positions=256))
    losses = []
    for device in ("cpu", "cuda"):
        weights = base.weights.like(base.weights.flat.clone())
        learner = Learner(base.shape, weights, torch.device(device), torch.float32, Dropout(), seed=0)
        losses.append([float(learner.step(_ids(2, 256).to(device), 1e-3)) for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_weights_are_views_of_one_vector() -> None:
    weights = Weights({"a": (2, 3), "b": (4,)}, torch.arange(10.0))
    weights.named["b"].zero_()
    assert weights.flat.tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 0, 0]
