"""Choosing the next token of every row of a step at once, each row with parameters of its own.

The meaning of each parameter, and their order, are transformers' (`generation/logits_process.py`), and the
tests compare against it; only among tokens of exactly equal logits may others be kept. Rows that only use
top_p (the default of every tweet model) never sort: a token is drawn from the full distribution and kept if it
belongs to the nucleus, which it does with probability about top_p, else drawn again. That is exact, and needs
one pass over the vocabulary instead of a sort. On a CPU the compiled library draws such rows, with the same numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.engine.native.draw import NOT_FINITE, UNDECIDED, Draw, draw
from serve.engine.native.library import is_supported
from serve.engine.randomness import DRAWS
from serve.types import SamplingParams

NEVER = float("-inf")
MIN_TEMPERATURE = 0.01
MAX_LOGIT = 1e30  # beyond, differences and penalties overflow; no sound model comes near
TOP_K_WITHOUT_SORT = 1024  # 32 rows of GPT-2's vocabulary: topk(50) 1.7 ms, topk(1024) 11 ms, a sort 115 ms (one core)


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What one row needs to be sampled; `prompt_ids` and `generated` are only read for penalties."""

    params: SamplingParams
    uniforms: Sequence[float]  # `randomness.uniforms` of this row's position
    prompt_ids: Sequence[int]
    generated: Counter[int]
    eos_id: int
    num_generated: int
    top_logprobs: int = 0

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature == 0

    @property
    def needs_sort(self) -> bool:
        p = self.params
        return not self.is_greedy and (p.top_k > 0 or p.min_p > 0 or p.typical_p < 1)

    @property
    def is_plain(self) -> bool:
        """Whether its logits are taken as they are, the end of the text aside, and nothing is asked about others."""
        p = self.params
        penalised = p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty
        return not (self.needs_sort or self.top_logprobs or penalised or p.logit_bias)

    @property
    def bans_end(self) -> bool:
        """Whether the text must not end yet."""
        return self.params.ignore_eos or self.num_generated < self.params.min_new_tokens

    @property
    def is_short(self) -> bool:
        """Whether few enough tokens are allowed to find them without a sort."""
        return 0 < self.params.top_k <= TOP_K_WITHOUT_SORT


@dataclass(frozen=True, slots=True)
class Sampled:
    """The outcome for one row. `token_id` is None where the model's numbers were not finite."""

    token_id: int | None
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled]:
    """One token for each of the ``(N, V)`` float32 rows; does not modify `logits`.

    Log-probabilities are the model's own: before penalties, temperature and filters. A row with NaN or
    infinity yields ``token_id=None`` and does not touch its neighbours.
    """
    sampled: dict[int, Sampled] = {}
    if logits.device.type == "cpu" and is_supported("float32"):
        sampled = _draw_plain(logits, rows)
    rest = [i for i in range(len(rows)) if i not in sampled]
    if rest:
        subset = logits if len(rest) == len(rows) else logits[rest]
        sampled |= zip(rest, _sample(subset, [rows[i] for i in rest]), strict=True)
    return [sampled[i] for i in range(len(rows))]


def _draw_plain(logits: Tensor, rows: Sequence[SamplingRow]) -> dict[int, Sampled]:
    """The plain rows' outcomes by their index, but for those that need the slower way after all."""
    plain = [i for i, row in enumerate(rows) if row.is_plain]
    if not plain:
        return {}
    draws = [
        Draw(
            rows[i].uniforms,
            0 if rows[i].is_greedy else max(rows[i].params.temperature, MIN_TEMPERATURE),
            rows[i].params.top_p,
            rows[i].eos_id if rows[i].bans_end else -1,
        )
        for i in plain
    ]
    drawn = draw(logits if len(plain) == len(rows) else logits[plain], draws)
    return {
        i: Sampled(None if token == NOT_FINITE else token, logprob)
        for i, (token, logprob) in zip(plain, drawn, strict=True)
        if token != UNDECIDED
    }


def _sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled]:
    """As `sample`, with torch, on any device."""
    finite = torch.isfinite(logits.sum(-1)) & (logits.abs().amax(-1) < MAX_LOGIT)  # NaN and Inf survive a sum
    if not bool(finite.all()):
        logits = torch.where(finite[:, None], logits, torch.zeros((), dtype=logits.dtype, device=logits.device))
    normaliser = torch.logsumexp(logits, -1)  # (N,)
    chosen = choose(adjust(logits, rows), rows)  # (N,)
    logprobs = (logits.gather(1, chosen[:, None]).squeeze(1) - normaliser).tolist()
    tops = _top_logprobs(logits, normaliser, rows)
    return [
        Sampled(token if ok else None, logprob, top)
        for token, ok, logprob, top in zip(chosen.tolist(), finite.tolist(), logprobs, tops, strict=True)
    ]


def adjust(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Bias, penalties and the ban on an early end: what changes logits themselves. Copies only if needed."""
    edited = logits
    for index, row in enumerate(rows):
        p = row.params
        penalised = p.repetition_penalty != 1 or ((p.presence_penalty or p.frequency_penalty) and row.generated)
        if not (penalised or row.bans_end or p.logit_bias):
            continue
        if edited is logits:
            edited = logits.clone()
        _adjust_row(edited[index], row)
    return edited


def _adjust_row(logits: Tensor, row: SamplingRow) -> None:
    p = row.params
    if p.logit_bias:
        values = torch.tensor([value for _, value in p.logit_bias], dtype=logits.dtype, device=logits.device)
        logits[[token for token, _ in p.logit_bias]] += values
    if p.repetition_penalty != 1:
        seen = list({*row.prompt_ids, *row.generated})
        scores = logits[seen]
        logits[seen] = torch.where(scores < 0, scores * p.repetition_penalty, scores / p.repetition_penalty)
    if (p.presence_penalty or p.frequency_penalty) and row.generated:
        ids, counts = list(row.generated), torch.tensor(list(row.generated.values()), device=logits.device)
        logits[ids] -= p.presence_penalty + p.frequency_penalty * counts
    if row.bans_end:
        logits[row.eos_id] = NEVER


def choose(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """(N, V) adjusted logits -> (N,) token ids, greedy or drawn from each row's filtered distribution."""
    if all(row.is_greedy for row in rows):
        return logits.argmax(-1)
    device = logits.device
    # From the maximum down, so that no temperature can overflow; below 0.01 all is greedy but for rounding.
    temperature = torch.tensor([max(row.params.temperature, MIN_TEMPERATURE) for row in rows], device=device)
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature[:, None]
    chosen = (
        logits.argmax(-1)
        if any(row.is_greedy for row in rows)
        else torch.empty(len(rows), dtype=torch.int64, device=device)
    )
    by_sort = [i for i, row in enumerate(rows) if row.needs_sort and not row.is_short]
    by_topk = [i for i, row in enumerate(rows) if row.needs_sort and row.is_short]
    by_rejection = [i for i, row in enumerate(rows) if not row.needs_sort and not row.is_greedy]
    for indices, method in ((by_rejection, draw_by_rejection), (by_topk, draw_by_sort), (by_sort, draw_by_sort)):
        if indices:
            subset = scaled if len(indices) == len(rows) else scaled[indices]
            chosen[indices] = method(subset, [rows[i] for i in indices])
    return chosen


def draw_by_rejection(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Draw from each row's nucleus without sorting: (N, V) -> (N,)."""
    probs = torch.softmax(logits, -1)
    cumulative = probs.cumsum(-1)
    uniforms = torch.tensor([row.uniforms for row in rows], dtype=torch.float64)  # (N, DRAWS)
    top_p = torch.tensor([row.params.top_p for row in rows], device=logits.device)
    chosen = _invert(cumulative, uniforms[:, 0])
    pending = torch.arange(len(rows), device=logits.device)[top_p < 1]
    for attempt in range(1, DRAWS):
        if not len(pending):
            return chosen
        mine = probs if len(pending) == len(rows) else probs[pending]
        bar = mine.gather(1, chosen[pending][:, None])
        above = torch.where(mine > bar, mine, 0.0).sum(-1)  # mass of strictly likelier tokens
        pending = pending[above >= top_p[pending]]
        chosen[pending] = _invert(cumulative[pending], uniforms[pending.cpu(), attempt])
    # All draws used up (a chance of (1 - top_p)^7): the exact, slower way decides, and still by this row's numbers.
    if len(pending):
        chosen[pending] = draw_by_sort(logits[pending], [rows[i] for i in pending.tolist()])
    return chosen


def _invert(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse transform sampling: the first index whose cumulative mass exceeds u x total."""
    total = cumulative[:, -1:].contiguous()
    targets = uniforms.to(cumulative.device)[:, None].to(cumulative.dtype) * total
    index = torch.searchsorted(cumulative, targets, right=True).squeeze(1)
    # float32 rounding can put the target on the total itself: step back to a token that has mass.
    last = torch.searchsorted(cumulative, total).squeeze(1)
    return torch.minimum(index, last).clamp(max=cumulative.shape[-1] - 1)


def draw_by_sort(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Draw with every filter applied in transformers' order: (N, V) -> (N,)."""
    device = logits.device
    if all(row.is_short for row in rows):
        ordered, ids = logits.topk(min(max(row.params.top_k for row in rows), logits.shape[-1]), -1)
    else:
        ordered, ids = logits.sort(dim=-1, descending=True, stable=True)

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=device)[:, None]

    # 1. top_k.
    vocab = ordered.shape[-1]
    kth = [min(row.params.top_k or vocab, vocab) - 1 for row in rows]
    ordered = ordered.masked_fill(ordered < ordered.gather(1, torch.tensor(kth, device=device)[:, None]), NEVER)
    # 2. top_p keeps a token while the mass before it is below p; always the first.
    top_p = column([row.params.top_p for row in rows])
    probs = torch.softmax(ordered, -1)
    before = probs.cumsum(-1) - probs
    before[:, 0] = 0
    ordered = ordered.masked_fill((before >= top_p) & (top_p < 1), NEVER)
    # 3. min_p is relative to the likeliest token.
    min_p = column([row.params.min_p for row in rows])
    probs = torch.softmax(ordered, -1)
    ordered = ordered.masked_fill(probs < min_p * probs[:, :1], NEVER)
    # 4. typical_p.
    typical = [i for i, row in enumerate(rows) if row.params.typical_p < 1]
    if typical:
        mass = torch.tensor([rows[i].params.typical_p for i in typical], device=device)
        ordered[typical] = _keep_typical(ordered[typical], mass)
    cumulative = torch.softmax(ordered, -1).cumsum(-1)
    uniforms = torch.tensor([row.uniforms[-1] for row in rows], dtype=torch.float64)
    return ids.gather(1, _invert(cumulative, uniforms)[:, None]).squeeze(1)


def _keep_typical(logits: Tensor, mass: Tensor) -> Tensor:
    """Locally typical sampling (Source: Meister et al., 2022): keep the least surprising-or-boring `mass`."""
    logprobs = torch.log_softmax(logits, -1)
    entropy = -torch.nansum(logprobs * logprobs.exp(), -1, keepdim=True)
    distance = (-logprobs - entropy).abs()
    nearest, order = distance.sort(-1)
    cumulative = logits.gather(1, order).softmax(-1).cumsum(-1)
    last = (cumulative < mass[:, None]).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return logits.masked_fill(distance > nearest.gather(1, last), NEVER)


def _top_logprobs(
    logits: Tensor, normaliser: Tensor, rows: Sequence[SamplingRow]
) -> list[tuple[tuple[int, float], ...]]:
    most = max((row.top_logprobs for row in rows), default=0)
    if most == 0:
        return [()] * len(rows)
    values, ids = logits.topk(min(most, logits.shape[-1]), -1)
    pairs = zip(ids.tolist(), (values - normaliser[:, None]).tolist(), rows, strict=True)
    return [tuple(zip(i[: row.top_logprobs], v[: row.top_logprobs], strict=True)) for i, v, row in pairs]
