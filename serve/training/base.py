"""Train a small GPT-2 from nothing on a file of short texts: the recipe behind `fledgling`.

    python -m serve.training.base --corpus tweets.txt.gz --out serve/store/embedded/fledgling

One text a line. Learns a byte-level BPE, packs the texts (``<|endoftext|>`` between them) into
blocks of the model's context, and trains with Muon on the hidden matrices and AdamW on the rest
(Source: K. Jordan et al., "Muon", 2024; `torch.optim.Muon`) under a warm-up / constant / linear
cool-down schedule, so that a run can be lengthened with ``--resume`` before its cool-down begins.
It knows nothing of archives, jobs or serving.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from serve.logs import configure, get_logger
from serve.settings import Settings

log = get_logger()

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 0.01
# For fine-tunes of a base this small. Held-out loss (nats a token) after 1, 2 and 4 times huggingtweets' rate: 3.63,
# 3.55, 3.56 with 479 posts of a voice far from the base's; 4.05 after 1 and 4.10 after 2 with 2,216 of one close to it.
FINE_TUNE_MULTIPLIER = 2


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result; stored beside the weights."""

    vocab_size: int = 8192
    n_positions: int = 256
    n_embd: int = 256
    n_layer: int = 6
    n_head: int = 4
    batch_blocks: int = 16
    epochs: float = 1.0
    muon_lr: float = 2e-3  # "match_rms_adamw": the same scale as AdamW's
    adamw_lr: float = 3e-3
    warmup_steps: int = 60
    cooldown_share: float = 0.35
    seed: int = 0


def read_texts(corpus: Path) -> list[str]:
    """The non-empty lines of `corpus` (gzip by its name), in order."""
    opener: Any = gzip.open if corpus.suffix == ".gz" else open
    with opener(corpus, "rt", encoding="utf-8") as lines:
        return [line for raw in lines if (line := raw.strip())]


def train_tokenizer(texts: list[str], vocab_size: int) -> ByteLevelBPETokenizer:
    """A byte-level BPE of exactly GPT-2's kind; ``<|endoftext|>`` is its last id, as in GPT-2."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocab_size - 1, min_frequency=2, show_progress=False)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def pack(texts: list[str], tokenizer: ByteLevelBPETokenizer, block: int) -> Tensor:
    """Texts -> ``(num_blocks, block)`` int64; each text is preceded by ``<|endoftext|>``, the tail is cut."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for start in range(0, len(texts), 10_000):
        for encoding in tokenizer.encode_batch(texts[start : start + 10_000]):
            ids.append(end)
            ids.extend(encoding.ids)
    usable = len(ids) // block * block
    return torch.tensor(ids[:usable]).view(-1, block)


def batches(blocks: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Endless ``(size, block)`` batches; each epoch in an order that `seed` and its number decide."""
    epoch = 0
    while True:
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for start in range(0, len(order) - size + 1, size):
            yield blocks[order[start : start + size]]
        epoch += 1


def learning_rate_scale(step: int, total: int, recipe: Recipe) -> float:
    """Warm-up, constant, linear cool-down to 2 %."""
    cooldown = max(1, int(total * recipe.cooldown_share))
    return min((step + 1) / recipe.warmup_steps, max(0.02, (total - step) / cooldown), 1.0)


def build_optimizers(model: GPT2LMHeadModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, norms and biases."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".h." in n)]
    return [
        torch.optim.Muon(hidden, lr=recipe.muon_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def next_token_loss(model: Any, batch: Tensor) -> Tensor:
    """Mean cross entropy (nats a token) of ``(B, T)`` ids; bf16 arithmetic, float32 loss."""
    with torch.autocast(batch.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=batch, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, blocks: Tensor, device: torch.device) -> float:
    """Mean loss in nats a token over all of `blocks`, in float32."""
    model.eval()
    total = 0.0
    for start in range(0, len(blocks), 32):
        batch = blocks[start : start + 32]
        logits = model(input_ids=batch.to(device), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), batch[:, 1:].to(device).flatten(), reduction="sum"
        )
        total += float(loss)
    model.train()
    return total / blocks[:, 1:].numel()


def train(corpus: Path, out: Path, recipe: Recipe, *, resume: Path | None = None) -> dict[str, Any]:
    """Run the recipe and write a plain Hugging Face folder to `out`; returns its training record."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(recipe.seed)

    # 1. Texts: the last share is held out, both from the tokenizer and from training.
    texts = read_texts(corpus)
    num_held_out = max(1, int(len(texts) * HELD_OUT_SHARE))
    held_out_texts = texts[-num_held_out:]
    tokenizer = train_tokenizer(texts[:-num_held_out], recipe.vocab_size)
    blocks = pack(texts[:-num_held_out], tokenizer, recipe.n_positions)
    held_out = pack(held_out_texts, tokenizer, recipe.n_positions)
    total = int(len(blocks) // recipe.batch_blocks * recipe.epochs)
    log.info("base_data", texts=len(texts), blocks=len(blocks), steps=total)

    # 2. Model and optimizers.
    end = tokenizer.token_to_id(END_OF_TEXT)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=tokenizer.get_vocab_size(),
            n_positions=recipe.n_positions,
            n_embd=recipe.n_embd,
            n_layer=recipe.n_layer,
            n_head=recipe.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=end,
            eos_token_id=end,
        )
    ).to(device)
    optimizers = build_optimizers(model, recipe)
    base_rates = [group["lr"] for o in optimizers for group in o.param_groups]
    first_step = 0
    if resume is not None:
        state = torch.load(resume, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first_step = state["step"]
    step_model = torch.compile(model)

    # 3. Steps.
    started = time.monotonic()
    source = batches(blocks, recipe.batch_blocks, recipe.seed)
    running: float | None = None
    for step, batch in zip(range(total), source, strict=False):
        if step < first_step:
            continue
        scale = learning_rate_scale(step, total, recipe)
        for group, rate in zip((g for o in optimizers for g in o.param_groups), base_rates, strict=True):
            group["lr"] = rate * scale
        loss = next_token_loss(step_model, batch.to(device))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        if step % 20 == 0:
            rate = (step + 1 - first_step) * batch.numel() / (time.monotonic() - started)
            log.info("base_step", step=step, steps=total, loss=round(running, 4), lr_scale=scale, tokens_s=round(rate))
        if (step + 1) % 400 == 0:
            _checkpoint(out / "checkpoint.pt", model, optimizers, step + 1)

    # 4. The folder.
    loss_nats = held_out_loss(model, held_out, device)
    held_out_bytes = sum(len(text.encode()) + 1 for text in held_out_texts)
    record = {
        "recipe": asdict(recipe),
        "learning_rate_multiplier": FINE_TUNE_MULTIPLIER,
        "steps": total,
        "tokens_seen": total * recipe.batch_blocks * recipe.n_positions,
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_texts": num_held_out,
        "held_out_loss": round(loss_nats, 4),
        "held_out_perplexity": round(math.exp(loss_nats), 2),
        "held_out_bits_per_byte": round(loss_nats * held_out.numel() / math.log(2) / held_out_bytes, 4),
        "torch": torch.__version__,
    }
    write_folder(out, model, tokenizer, record)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    return record


def _checkpoint(path: Path, model: GPT2LMHeadModel, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def write_folder(out: Path, model: GPT2LMHeadModel, tokenizer: ByteLevelBPETokenizer, record: dict[str, Any]) -> None:
    """bf16 safetensors, tokenizer files, sampling defaults and `training.json`."""
    from transformers import GenerationConfig, GPT2TokenizerFast

    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_p=0.95,
        temperature=1.0,
        max_length=160,
        min_length=10,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    fast = GPT2TokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=model.config.n_positions,
    )
    fast.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="one text a line, .txt or .txt.gz")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    parser.add_argument("--epochs", type=float, default=Recipe().epochs)
    parser.add_argument("--seed", type=int, default=Recipe().seed)
    parser.add_argument("--resume", type=Path, help="a checkpoint.pt of an unfinished run")
    args = parser.parse_args()
    configure(Settings.from_env(), part="base")
    recipe = Recipe(epochs=args.epochs, seed=args.seed)
    record = train(args.corpus, args.out, recipe, resume=args.resume)
    print(json.dumps(record, indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
