"""The obvious way: every model loaded by transformers, one `model.generate` for each request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from loadtest.engine.work import Case, Work


class Generate:
    """A contender. Its rate is the same for 1 and 4 streams a model, as requests go one after another."""

    name = "generate bf16"
    cases = frozenset({"8x1"})

    def __init__(self, folders: Sequence[Path]) -> None:
        self._models = [load(folder) for folder in folders]

    @torch.inference_mode()
    def run(self, case: Case, work: Work, seed: int) -> int:
        ids = torch.tensor([work.prompt_ids])
        torch.manual_seed(seed)
        count = 0
        for _ in range(case.streams):
            for model in self._models[: case.models]:
                text = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=True, top_p=work.top_p, top_k=0,
                    temperature=work.temperature, max_new_tokens=work.num_tokens,
                    min_new_tokens=work.num_tokens, pad_token_id=50256,
                )  # fmt: skip
                count += text.shape[1] - ids.shape[1]
        return count


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def load_and_touch(folder: Path) -> Any:
    """A model of which every page is in memory: `from_pretrained` alone maps the file and reads little of it."""
    model = load(folder)
    for parameter in model.parameters():
        parameter.detach().view(-1).view(torch.uint8)[::4096].sum()
    return model


@torch.inference_mode()
def greedy(folder: Path, prompt_ids: Sequence[int], num_tokens: int) -> list[int]:
    """The reference's own choice of tokens, in float32."""
    model = load(folder).float()
    ids = torch.tensor([prompt_ids])
    text = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens,
        min_new_tokens=num_tokens, pad_token_id=50256,
    )  # fmt: skip
    return [int(token) for token in text[0, len(prompt_ids) :]]
