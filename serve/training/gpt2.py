"""A GPT-2 as training needs it: its loss with every gradient, logits to judge by, and texts token by token.

Weights are views of one vector, so that an optimizer's step, a conversion or a checkpoint is one pass over memory.
Written out rather than taken from transformers, whose import alone takes 2 s; tested against it. Knows no texts.
Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), as transformers computes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from serve.errors import ModelUnusable
from serve.shape import GPT2Shape, canonical_name
from serve.store.validate import WEIGHTS, check_folder

HEAD, EMBEDDING, POSITIONS = "lm_head.weight", "wte.weight", "wpe.weight"
# Of the attention computed at once, so that scores of later keys, which are never seen, are mostly not computed
# (one core, 12 heads of 64, bf16, forward and backward: 1,024 tokens 40 ms, 67 by torch's fused attention on a CPU).
_QUERY_BLOCK = 256
_LOSS_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}  # float32 logits at a time: 2 MB stay in a core's cache


class Weights:
    """All parameters in one vector, `flat`, and each by its canonical name as a view of it."""

    def __init__(self, sizes: Mapping[str, tuple[int, ...]], flat: Tensor) -> None:
        self.flat = flat
        self.named: dict[str, Tensor] = {}
        start = 0
        for name, size in sizes.items():
            end = start + math.prod(size)
            self.named[name] = flat[start:end].view(size)
            start = end
        assert start == flat.numel()

    def like(self, flat: Tensor) -> Weights:
        """Another vector under the same names."""
        return Weights({name: tuple(tensor.shape) for name, tensor in self.named.items()}, flat)


@dataclass(frozen=True, slots=True)
class Base:
    """A model folder that was read: its weights in float32, whatever its file holds (`dtype`)."""

    config: Mapping[str, Any]
    shape: GPT2Shape
    weights: Weights
    dtype: torch.dtype


def read_base(folder: Path) -> Base:
    """Raises: ModelUnusable."""
    shape = check_folder(folder)
    config = json.loads((folder / "config.json").read_bytes())
    sizes = shape.tensor_shapes()
    try:
        stored = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as exc:
        raise ModelUnusable("The base model's weights cannot be read.", param="model") from exc
    tensors = {canonical_name(name): tensor for name, tensor in stored.items()}
    # As transformers has it: a config that ties the output layer does not undo one that is stored and differs.
    may_tie = config.get("tie_word_embeddings", True) is not False
    if may_tie and (HEAD not in tensors or torch.equal(tensors[HEAD], tensors[EMBEDDING])):
        del sizes[HEAD]
    weights = Weights(sizes, torch.cat([tensors[name].flatten().float() for name in sizes]))
    return Base(config, shape, weights, tensors[EMBEDDING].dtype)


def write_weights(folder: Path, base: Base, weights: Weights) -> None:
    """config.json and the weights in the base's dtype, as transformers names and stores them."""
    dtype = str(base.dtype).removeprefix("torch.")
    config = {key: value for key, value in base.config.items() if key != "torch_dtype"}  # its name before 4.56
    config |= {"architectures": ["GPT2LMHeadModel"], "dtype": dtype, "use_cache": True}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    stored = weights.flat.to("cpu", base.dtype)
    tensors = {name if name == HEAD else f"transformer.{name}": t for name, t in weights.like(stored).named.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@dataclass(frozen=True, slots=True)
class Dropout:
    """Shares that are dropped in training, as config.json names them; GPT-2's own are 0.1."""

    embedding: float = 0.0
    residual: float = 0.0
    attention: float = 0.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Dropout:
        return cls(*(float(config.get(key, 0.1)) for key in ("embd_pdrop", "resid_pdrop", "attn_pdrop")))

    def __bool__(self) -> bool:
        return max(self.embedding, self.residual, self.attention) > 0


NO_DROPOUT = Dropout()
KVCache = list[Tensor]  # (2, B * H, T, hd) of each layer: the keys and values so far


class GPT2:
    """The forward pass over weights of any one dtype and device, which it computes in. Never modifies them."""

    def __init__(self, shape: GPT2Shape, weights: Weights) -> None:
        self.shape, self.weights = shape, weights
        self.device, self.dtype = weights.flat.device, weights.flat.dtype
        self._named = weights.named
        self._head = weights.named.get(HEAD, weights.named[EMBEDDING])
        # The two forms of GELU differ by 0.0005 at most, which bf16 hardly tells apart; on a CPU torch computes the
        # exact one in a quarter of the time.
        self._gelu = "none" if self.dtype == torch.bfloat16 and self.device.type == "cpu" else shape.gelu
        length = shape.n_positions
        future = torch.full((length, length), float("-inf"), dtype=self.dtype, device=self.device)
        self._mask = future.triu_(1)  # (T, T): minus infinity where a key comes after the query

    @torch.no_grad()
    def logits(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """``(B, T)`` ids -> ``(B, T, V)`` float32.

        With a cache, which is extended, they follow what it holds; only the first call may then have several tokens.
        """
        past = cache[0].shape[2] if cache else 0
        x = self._blocks(self._embed(ids, past), NO_DROPOUT, cache)
        return (x @ self._head.T).float()

    def loss_and_gradients(self, ids: Tensor, gradients: Weights, dropout: Dropout = NO_DROPOUT) -> Tensor:
        """Mean nats a token of ``(B, T)`` ids after their first; overwrites float32 `gradients`.

        Dropout draws from torch's global generator.
        """
        leaves = {name: t for name, t in self._named.items() if name not in (EMBEDDING, POSITIONS, HEAD)}
        for leaf in leaves.values():
            leaf.requires_grad_()
        with torch.enable_grad():
            embedded = self._embed(ids).requires_grad_()
            x = self._blocks(_drop(embedded, dropout.embedding), dropout)
        # The head's matrices are the largest by far, so what they need is done by hand, in place.
        x, at = x, x.detach()[:, :-1].flatten(0, 1)
        loss, d_logits = _loss_and_gradient(at @ self._head.T, ids[:, 1:].flatten())
        d_x = torch.zeros_like(x)
        d_x[:, :-1] = (d_logits @ self._head).view(len(ids), -1, x.shape[-1])
        d_embedded, *rest = torch.autograd.grad(x, [embedded, *leaves.values()], d_x)

        named = gradients.named
        torch._foreach_copy_([named[name] for name in leaves], rest)
        if HEAD in named:
            named[EMBEDDING].zero_()
        named[HEAD if HEAD in named else EMBEDDING].copy_(d_logits.T @ at)
        named[EMBEDDING].index_add_(0, ids.flatten(), d_embedded.flatten(0, 1).float())
        named[POSITIONS].zero_()
        named[POSITIONS][: ids.shape[1]] = d_embedded.float().sum(0)
        return loss

    def _embed(self, ids: Tensor, past: int = 0) -> Tensor:
        with torch.no_grad():
            positions = self._named[POSITIONS][past : past + ids.shape[1]]
            return F.embedding(ids, self._named[EMBEDDING]) + positions  # (B, T, D)

    def _blocks(self, x: Tensor, dropout: Dropout, cache: KVCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D), the last layer norm included."""
        shape, size = self.shape, x.shape

        def linear(name: str, x: Tensor) -> Tensor:
            return torch.addmm(self._named[f"{name}.bias"], x, self._named[f"{name}.weight"])

        def norm(name: str, x: Tensor) -> Tensor:
            weight, bias = self._named[f"{name}.weight"], self._named[f"{name}.bias"]
            return F.layer_norm(x, x.shape[-1:], weight, bias, shape.layer_norm_epsilon)

        x = x.flatten(0, 1)  # (B * T, D)
        for layer in range(shape.n_layer):
            block = f"h.{layer}"
            qkv = linear(f"{block}.attn.c_attn", norm(f"{block}.ln_1", x))
            mixed = self._attend(layer, qkv.view(*size[:2], 3, shape.n_head, -1), dropout.attention, cache)
            x = x + _drop(linear(f"{block}.attn.c_proj", mixed.flatten(0, 1)), dropout.residual)
            hidden = F.gelu(linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x)), approximate=self._gelu)
            x = x + _drop(linear(f"{block}.mlp.c_proj", hidden), dropout.residual)
        return norm("ln_f", x).view(size)

    def _attend(self, layer: int, qkv: Tensor, dropout: float, cache: KVCache | None) -> Tensor:
        """(B, T, 3, H, hd) -> (B, T, D)."""
        batch, length, _, heads, width = qkv.shape
        scale = width**-0.5 if self.shape.scale_attn_weights else 1.0
        scale /= layer + 1 if self.shape.scale_attn_by_inverse_layer_idx else 1
        if self.device.type == "cuda" and cache is None:
            query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, hd)
            fused = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scale)
            return fused.transpose(1, 2).flatten(2)
        parts = qkv.permute(2, 0, 3, 1, 4).reshape(3, batch * heads, length, width)
        query, keys = parts[0], parts[1:]
        if cache is not None:
            if len(cache) > layer:
                keys = torch.cat([cache[layer], keys], 2)
                cache[layer] = keys
            else:
                cache.append(keys)
        past = keys.shape[2] - length
        assert past == 0 or length == 1
        mask = self._mask[past : past + length]
        mixed: Tensor = _Attention.apply(query, keys[0], keys[1], mask, scale, dropout)  # type: ignore[no-untyped-call]
        return mixed.view(batch, heads, length, width).transpose(1, 2).flatten(2)


class _Attention(torch.autograd.Function):
    """Causal attention of ``(B * H, T, hd)``, a block of queries at a time; probabilities are kept for the way back."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, dropout: float
    ) -> Tensor:
        mixed, saved = [], []
        past = key.shape[1] - query.shape[1]
        for start in range(0, query.shape[1], _QUERY_BLOCK):
            some = query[:, start : start + _QUERY_BLOCK]
            end = past + start + some.shape[1]  # of the keys that these queries see
            scores = torch.baddbmm(mask[start : start + _QUERY_BLOCK, :end], some, key[:, :end].mT, alpha=scale)
            probs = torch.softmax(scores, -1)
            keep = _keep(probs, dropout)
            mixed.append(torch.bmm(probs if keep is None else probs * keep, value[:, :end]))
            saved += [probs, keep]
        ctx.save_for_backward(query, key, value, *saved)
        ctx.scale = scale
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed, 1)

    @staticmethod
    def backward(ctx: Any, d_mixed: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *saved = ctx.saved_tensors
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for i, (probs, keep) in enumerate(zip(saved[::2], saved[1::2], strict=True)):
            rows, end = slice(i * _QUERY_BLOCK, (i + 1) * _QUERY_BLOCK), probs.shape[2]
            some, d_some = query[:, rows], d_mixed[:, rows]
            d_value[:, :end].baddbmm_((probs if keep is None else probs * keep).mT, d_some)
            d_probs = torch.bmm(d_some, value[:, :end].mT)
            if keep is not None:
                d_probs *= keep
            d_scores = torch._softmax_backward_data(d_probs, probs, -1, probs.dtype)
            d_query[:, rows].baddbmm_(d_scores, key[:, :end], beta=0, alpha=ctx.scale)
            d_key[:, :end].baddbmm_(d_scores.mT, some, alpha=ctx.scale)
        return d_query, d_key, d_value, None, None, None


def _loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of ``(N, V)`` logits, in float32, and its gradient, which takes the place of `logits`."""
    rows = max(1, _LOSS_ELEMENTS[logits.device.type] // logits.shape[1])
    total = torch.zeros((), device=logits.device)
    for part, wanted in zip(torch.split(logits, rows), torch.split(targets[:, None], rows), strict=True):
        probs = torch.softmax(part, -1, dtype=torch.float32)
        found = probs.gather(1, wanted)
        # clamp: what is less likely than float32 can say is still a number; NaN stays what it is
        total -= found.clamp_min(torch.finfo(torch.float32).tiny).log_().sum()
        part.copy_(probs.scatter_(1, wanted, found - 1).div_(len(targets)))
    return total / len(targets), logits


def _drop(x: Tensor, share: float) -> Tensor:
    keep = _keep(x, share)
    return x if keep is None else x * keep


def _keep(x: Tensor, share: float) -> Tensor | None:
    """What to multiply by: 0 for a random `share`, to the nearest 256th, else what keeps the mean; None for no share.

    A random byte each, drawn eight at once: a third of the time of torch's own dropout on a CPU.
    """
    threshold = round(share * 256)
    if threshold == 0:
        return None
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
    drawn = words.random_(-(2**63), None).view(torch.uint8)[: x.numel()].view(x.shape)
    return (drawn >= threshold).to(x.dtype).mul_(256 / (256 - threshold))
