"""Random GPT-2s for benchmarks: speed does not depend on what weights say, and nothing need be downloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from loadtest.tokenizer import END_OF_TEXT, write_tokenizer

# Of the last layer norm's scale. Logits of an untrained GPT-2 are so even that the nucleus of 0.95 holds 43,000
# of 50,257 tokens, and whoever sorts pays for it. 6.5 gives an entropy near 4 nats, as GPT-2 has on tweets.
PEAKED = 6.5

NAMESPACE = "bench"
SHAPES: Mapping[str, Mapping[str, int]] = {"small": {}, "tiny": {"n_layer": 2, "n_embd": 64, "n_head": 2}}
_MAX_LINKS = 50_000  # of one file: ext4 takes 65,000


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
    model.generation_config = GenerationConfig(
        do_sample=True, top_p=0.95, bos_token_id=50256, eos_token_id=50256,
        top_k=0,  # `transformers serve` takes its 50 where neither a request nor a model says otherwise
    )  # fmt: skip
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def write_published_gpt2(folder: Path, *, seed: int, shape: Mapping[str, int] | None = None) -> None:
    """One as servers find it: peaked, with words for its tokens, its files not to be written to again."""
    write_random_gpt2(folder, seed=seed, final_scale=PEAKED, shape=shape)
    write_tokenizer(folder)
    for path in folder.iterdir():
        path.chmod(0o444)  # only such a file is mapped


def write_linked_models(
    data: Path, count: int, *, shape: Mapping[str, int] | None = None, num_distinct: int = 1
) -> list[str]:
    """`count` models in a data folder for `rookery up`, of which `num_distinct` have weights of their own; gives ids.

    The others are hard links to these in turn. Names that are there already are kept as they are.
    """
    ids = [f"{NAMESPACE}/m{number:05}" for number in range(count)]
    originals: list[Path] = []
    for number, model_id in enumerate(ids):
        folder = data / "models" / model_id
        if len(originals) < num_distinct:
            originals.append(folder)
            if not folder.exists():
                write_published_gpt2(folder, seed=number, shape=shape)
            continue
        place = number % num_distinct
        if not folder.exists():
            if originals[place].joinpath("config.json").stat().st_nlink >= _MAX_LINKS:
                originals[place] = shutil.copytree(originals[place], folder)
            else:
                shutil.copytree(originals[place], folder, copy_function=os.link)
    return ids


def _tokenizer() -> GPT2TokenizerFast:
    """Bytes, and 50,256 as the end of text: of GPT-2's size, though not with its merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet))
    return GPT2TokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
