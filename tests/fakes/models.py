"""Real GPT-2 folders small enough to make in milliseconds: random weights, a real byte-level tokenizer."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from serve.shape import GPT2Shape

VOCAB_SIZE = 512
END_OF_TEXT = VOCAB_SIZE - 1  # GPT-2 too has <|endoftext|> as its last token

# Fixed, so that every tiny model shares one vocabulary; long enough for the 255 merges that fill it.
_CORPUS = """\
My dream is to build a little house by the sea and to write about the weather every morning.
I think that the best thing about the internet is that everybody can talk, and the worst thing is that everybody does.
Just had the most wonderful coffee of my life, thank you to everyone who came to the meetup yesterday!
Today we are launching something that we have been working on for months. Read more about it at https://example.com
Don't forget: there is nothing more important than family, friends, and a good night's sleep. I've learned that late.
The new release is out, with faster training, better sampling and fewer bugs. What would you like to see next?
People keep asking me how I manage to read so many books. The answer is simple: I don't watch television any more.
We're going to win this game, no question about it. Great team, great spirit, great fans. See you all on Saturday!
"""


def write_tiny_gpt2(
    folder: Path,
    *,
    seed: int = 0,
    n_layer: int = 2,
    n_embd: int = 32,
    n_head: int = 2,
    n_positions: int = 64,
    dtype: torch.dtype = torch.float32,
    tie: bool = True,
) -> Path:
    """Writes what ``save_pretrained`` of a GPT-2 and its tokenizer writes; the same arguments, the same bytes.

    Weights have a deviation of 0.2 (not GPT-2's 0.02) so that greedy texts differ between seeds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_positions=n_positions, dtype=dtype, tie=tie)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT})
    save_file(tiny_weights(config, seed=seed, dtype=dtype), folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    return folder


def tiny_config(
    *,
    n_layer: int = 2,
    n_embd: int = 32,
    n_head: int = 2,
    n_positions: int = 64,
    dtype: torch.dtype = torch.float32,
    tie: bool = True,
) -> dict[str, Any]:
    """A transformers ``config.json``."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": VOCAB_SIZE,
        "n_positions": n_positions,
        "n_embd": n_embd,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_inner": None,
        "layer_norm_epsilon": 1e-05,
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "tie_word_embeddings": tie,
        "dtype": str(dtype).removeprefix("torch."),
    }


def tiny_weights(config: dict[str, Any], *, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors under transformers' names. Drawn in float32, so one seed is one model in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in GPT2Shape.from_config(config).tensor_shapes().items():
        values = 0.2 * torch.randn(shape, generator=generator)
        if ".ln_" in name or name.startswith("ln_f"):
            values += name.endswith("weight")  # layer norms scale around one
        if name != "lm_head.weight":
            weights[f"transformer.{name}"] = values.to(dtype)
        elif not config["tie_word_embeddings"]:
            weights[name] = values.to(dtype)
    return weights


def write_tokenizer(folder: Path) -> None:
    """The files of a GPT-2 tokenizer: tokenizer.json, vocab.json, merges.txt, tokenizer_config.json."""
    tokenizer = json.loads(_tokenizer_json())
    (folder / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in tokenizer["model"]["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    _write_json(folder / "vocab.json", tokenizer["model"]["vocab"] | {"<|endoftext|>": END_OF_TEXT})
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    settings = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024, "add_prefix_space": False}
    _write_json(folder / "tokenizer_config.json", settings | special)


@cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS.splitlines(), trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    assert tokenizer.token_to_id("<|endoftext|>") == END_OF_TEXT, tokenizer.get_vocab_size()
    return str(tokenizer.to_str())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
