"""Random GPT-2s for benchmarks: speed does not depend on what weights say, and nothing need be downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

END_OF_TEXT = "<|endoftext|>"

# Of the last layer norm's scale. Logits of an untrained GPT-2 are so even that the nucleus of 0.95 holds 43,000
# of 50,257 tokens, and whoever sorts pays for it. 6.5 gives an entropy near 4 nats, as GPT-2 has on tweets.
PEAKED = 6.5


def write_random_gpt2(
    folder: Path,
    *,
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
    final_scale: float = 1.0,
    shape: Mapping[str, int] | None = None,
) -> None:
    """A GPT-2 as a plain Hugging Face folder; of the small shape (124M parameters) where `shape` does not differ."""
    torch.manual_seed(seed)
    config = GPT2Config(bos_token_id=50256, eos_token_id=50256, **(shape or {}))
    model = GPT2LMHeadModel(config)
    torch.nn.init.constant_(model.transformer.ln_f.weight, final_scale)
    model = model.to(dtype)
    model.generation_config = GenerationConfig(do_sample=True, top_p=0.95, bos_token_id=50256, eos_token_id=50256)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _tokenizer() -> GPT2TokenizerFast:
    """Bytes, and 50,256 as the end of text: of GPT-2's size, though not with its merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet))
    return GPT2TokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
