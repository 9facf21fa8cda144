"""What a model is worth: its loss on texts that it has not seen, and a few texts of its own.

Takes a transformers model and a tokenizer; knows nothing of how the model came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

PREVIEW_PROMPT = "My dream is"  # huggingtweets' own
PREVIEW_TOKENS = 160
BATCH_TOKENS = 2_048  # bounds the logits: 2,048 x 50,257 float32 are 412 MB


@torch.no_grad()
def held_out_loss(model: Any, texts: Sequence[Sequence[int]], end_id: int) -> float | None:
    """Mean nats a token over `texts` (ids), each after an end-of-text token and with one at its end.

    In the model's own dtype, losses in float32; each token counts the same. None without texts.
    """
    if not texts:
        return None
    limit = model.config.n_positions
    rows = sorted(([end_id, *text][:limit] + [end_id] for text in texts), key=len)
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in _batches(rows):
        inputs, targets = _pad(batch, end_id)
        logits = model(input_ids=inputs.to(model.device), use_cache=False).logits  # (B, T, V)
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets.to(model.device).flatten(), reduction="sum", ignore_index=-100
        )
        total += float(losses)
        count += sum(len(row) - 1 for row in batch)
    model.train(was_training)
    return total / count


def preview(
    model: Any,
    tokenizer: Tokenizer,
    *,
    num_texts: int,
    seed: int,
    prompt: str = PREVIEW_PROMPT,
    max_tokens: int = PREVIEW_TOKENS,
) -> list[str]:
    """`num_texts` continuations of `prompt` (which they begin with), sampled as huggingtweets does; seeded.

    Leaves torch's own random numbers, and the model's mode, as they were.
    """
    if num_texts == 0:
        return []
    end_id = tokenizer.token_to_id("<|endoftext|>")
    ids = torch.tensor([tokenizer.encode(prompt).ids], device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            num_return_sequences=num_texts,
            do_sample=True,
            top_p=0.95,
            top_k=0,
            max_length=min(max_tokens, model.config.n_positions),
            min_length=10,
            pad_token_id=end_id,
            use_cache=True,  # which training switches off
        )
    model.train(was_training)
    return [tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in output]


def _batches(rows: list[list[int]]) -> list[list[list[int]]]:
    """Consecutive rows (shortest first) in batches of at most `BATCH_TOKENS`, padding included."""
    batches: list[list[list[int]]] = []
    for row in rows:
        if not batches or (len(batches[-1]) + 1) * len(row) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(row)
    return batches


def _pad(batch: list[list[int]], end_id: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both (B, T). Padding is on the right, where a causal model's losses do not see it."""
    width = len(batch[-1]) - 1
    inputs = torch.full((len(batch), width), end_id)
    targets = torch.full((len(batch), width), -100)
    for i, row in enumerate(batch):
        inputs[i, : len(row) - 1] = torch.tensor(row[:-1])
        targets[i, : len(row) - 1] = torch.tensor(row[1:])
    return inputs, targets
