"""The forward pass: rows of many models through one GPT-2 shape.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), as
`transformers.models.gpt2` computes it, which is the reference it is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own name for it)
from torch import Tensor

from serve.engine.grouped.batch import Batch, Prompts
from serve.engine.grouped.kv_cache import KVCache
from serve.engine.grouped.weights import Slab
from serve.shape import GPT2Shape

BLOCK_MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


class GPT2:
    """The forward pass over one slab and one cache. Without prompts it waits for nothing, so it can be captured."""

    def __init__(self, shape: GPT2Shape, slab: Slab, cache: KVCache, *, tied: bool) -> None:
        self._shape, self._slab, self._cache = shape, slab, cache
        self._wte, self._wpe = slab.stack("wte.weight"), slab.stack("wpe.weight")
        self._head = slab.stack("wte.weight" if tied else "lm_head.weight").transpose(1, 2)
        self._matrices = {
            f"h.{layer}.{name}": slab.stack(f"h.{layer}.{name}.weight")
            for layer in range(shape.n_layer)
            for name in BLOCK_MATRICES
        }

    @torch.inference_mode()
    def forward(self, batch: Batch, prompts: Sequence[Prompts] = ()) -> Tensor:
        """Logits ``(N, V)`` float32 of the batch's head rows; modifies the cache at the batch's positions.

        `prompts`: of the spans that have more than one row.
        """
        shape, epsilon = self._shape, self._shape.layer_norm_epsilon
        ends = batch.ends.to(torch.int32)
        vectors = self._slab.vectors(batch.row_slots)

        def linear(name: str, x: Tensor) -> Tensor:
            return _grouped_mm(x, self._matrices[name], ends, batch.row_slots) + vectors[f"{name}.bias"]

        def layer_norm(name: str, x: Tensor) -> Tensor:
            normal = F.layer_norm(x, x.shape[-1:], eps=epsilon)
            return torch.addcmul(vectors[f"{name}.bias"], normal, vectors[f"{name}.weight"])

        x = self._wte[batch.row_slots, batch.token_ids] + self._wpe[batch.row_slots, batch.positions]  # (R, D)
        mask = _length_mask(batch, x.dtype)
        for layer in range(shape.n_layer):
            block = f"h.{layer}"
            qkv = linear(f"{block}.attn.c_attn", layer_norm(f"{block}.ln_1", x))  # (R, 3D)
            query, key, value = qkv.view(-1, 3, shape.n_head, shape.head_dim).unbind(1)  # each (R, H, hd)
            self._cache.write(layer, batch.kv_rows, batch.positions, key, value)
            mixed = self._attend(layer, query, batch, mask, prompts)
            x = x + linear(f"{block}.attn.c_proj", mixed.flatten(1))
            hidden = linear(f"{block}.mlp.c_fc", layer_norm(f"{block}.ln_2", x))
            x = x + linear(f"{block}.mlp.c_proj", F.gelu(hidden, approximate=shape.gelu))
        if not batch.size.heads:  # a step of prompt chunks alone
            return x.new_empty(0, shape.vocab_size, dtype=torch.float32)
        return self._logits(layer_norm("ln_f", x), ends, batch)

    def _logits(self, x: Tensor, ends: Tensor, batch: Batch) -> Tensor:
        slots = batch.row_slots
        if batch.size.heads < batch.size.rows:  # they cost most, so only where wanted
            x, slots = x.index_select(0, batch.head_rows), slots.index_select(0, batch.head_rows)  # (N, D), (N,)
            ends = batch.head_ends.to(torch.int32)
        return _grouped_mm(x, self._head, ends, slots)[:, : self._shape.vocab_size].float()

    def _attend(self, layer: int, query: Tensor, batch: Batch, mask: Tensor, prompts: Sequence[Prompts]) -> Tensor:
        """Causal attention of ``(R, H, hd)`` queries over their own sequences' keys -> ``(R, H, hd)``."""
        scale = self._attention_scale(layer)
        if batch.size.cache_rows:
            keys, values = self._cache.view(layer, batch.size.cache_rows, batch.size.length)
            ones = query.index_select(0, batch.queries).unsqueeze(2)  # (C, H, 1, hd)
            mixed = F.scaled_dot_product_attention(ones, keys, values, attn_mask=mask, scale=scale)
            out = mixed.squeeze(2).index_select(0, batch.kv_rows)  # a prompt's rows get anything, until below
        else:
            out = torch.empty_like(query)
        for some in prompts:
            keys, values = self._cache.gather(layer, some.kv_rows, some.mask.shape[-1])
            chunks = query[some.rows].view(len(some.kv_rows), -1, *query.shape[1:]).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(chunks, keys, values, attn_mask=some.mask, scale=scale)
            out[some.rows] = mixed.transpose(1, 2).flatten(0, 1)  # (S, H, T, hd) -> (S * T, H, hd)
        return out

    def _attention_scale(self, layer: int) -> float:
        scale = self._shape.head_dim**-0.5 if self._shape.scale_attn_weights else 1.0
        return scale / (layer + 1) if self._shape.scale_attn_by_inverse_layer_idx else scale


def _grouped_mm(x: Tensor, stack: Tensor, ends: Tensor, row_slots: Tensor) -> Tensor:
    """(R, in) -> (R, out), each row by the matrix of its own slot in ``[slots, in, out]``."""
    if is_aligned(x.shape[-1], x.dtype) and is_aligned(stack.shape[-1], x.dtype):
        return F.grouped_mm(x, stack, offs=ends)
    # Only toys have such a width; what this copies is small.
    return torch.bmm(x.unsqueeze(1), stack[row_slots]).squeeze(1)


def is_aligned(width: int, dtype: torch.dtype) -> bool:
    """Whether `grouped_mm` takes rows of `width` elements: they must fill whole 16 bytes."""
    return width * dtype.itemsize % 16 == 0


def _length_mask(batch: Batch, dtype: torch.dtype) -> Tensor:
    """(C, 1, 1, length): 0 where a key may be seen, else minus infinity."""
    positions = torch.arange(batch.size.length, device=batch.lengths.device)
    hidden = positions >= batch.lengths[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
    return mask[:, None, None, :]
