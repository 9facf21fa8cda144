"""What a model is worth: its loss on texts that it has not seen, and a few texts of its own.

Takes a GPT-2 and a tokenizer; knows nothing of how the model came about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from serve.engine.randomness import uniforms
from serve.engine.sampling import Sampled, SamplingRow, sample
from serve.errors import TrainingFailed
from serve.training.gpt2 import GPT2, KVCache
from serve.types import PREVIEW_PROMPT, SamplingParams

PREVIEW_TOKENS = 160
PREVIEW_MIN_TOKENS = 10
BATCH_TOKENS = 2_048  # bounds the logits: 2,048 x 50,257 float32 are 412 MB


def held_out_loss(model: GPT2, texts: Sequence[Sequence[int]], end_id: int) -> float | None:
    """Mean nats a token over `texts` (ids), each after an end-of-text token and with one at its end.

    In the model's own dtype, losses in float32; each token counts the same. Of a text longer than the context, as much
    as fits. None without texts.
    """
    if not texts:
        return None
    limit = model.shape.n_positions
    rows = sorted(([end_id, *text, end_id][: limit + 1] for text in texts), key=len)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for batch in _batches(rows):
        inputs, targets = (part.to(model.device) for part in _pad(batch, end_id))
        logits = model.logits(inputs).flatten(0, 1)
        total += torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=-100)
    return float(total) / sum(len(row) - 1 for row in rows)


def preview(
    model: GPT2,
    tokenizer: Tokenizer,
    *,
    num_texts: int,
    seed: int,
    prompt: str = PREVIEW_PROMPT,
    max_tokens: int = PREVIEW_TOKENS,
) -> list[str]:
    """`num_texts` continuations of `prompt` (which they begin with), sampled as huggingtweets does; seeded.

    At most `max_tokens` tokens each, the prompt included. Draws nothing from torch's own random numbers.
    """
    end_id = tokenizer.token_to_id("<|endoftext|>")
    assert end_id is not None, "whoever trains has refused such a tokenizer"
    prompt_ids: list[int] = tokenizer.encode(prompt).ids
    limit = min(max_tokens, model.shape.n_positions) - len(prompt_ids)
    params = SamplingParams(top_p=0.95, max_new_tokens=limit, min_new_tokens=PREVIEW_MIN_TOKENS - len(prompt_ids))
    texts: list[list[int]] = [[] for _ in range(num_texts)]
    open_texts = list(range(num_texts))
    ids, cache = torch.tensor([prompt_ids] * num_texts), KVCache()
    for position in range(limit if num_texts else 0):
        logits = model.logits(ids.to(model.device), cache)[:, -1]
        rows = [
            SamplingRow(params, uniforms(seed, i, position), prompt_ids, Counter(), end_id, position)
            for i in range(num_texts)
        ]
        chosen = [_token_id(sampled) for sampled in sample(logits, rows)]
        for i in open_texts:
            texts[i].append(chosen[i])
        open_texts = [i for i in open_texts if chosen[i] != end_id]
        if not open_texts:
            break
        ids = torch.tensor(chosen)[:, None]
    return [tokenizer.decode(prompt_ids + text, skip_special_tokens=True) for text in texts]


def _token_id(sampled: Sampled) -> int:
    if sampled.token_id is None:
        raise TrainingFailed("The model's numbers are not finite; a smaller learning_rate_multiplier may help.")
    return sampled.token_id


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
