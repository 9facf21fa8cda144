"""The forward pass: rows of many models through one GPT-2 shape.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), as
`transformers.models.gpt2` computes it, which is the reference it is tested against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from serve.engine.batch import Batch
from serve.engine.kv_cache import KVCache
from serve.engine.weights import Slab


@torch.inference_mode()
def forward(slab: Slab, cache: KVCache, batch: Batch) -> Tensor:
    """Logits ``(N, V)`` float32 of the batch's head rows; modifies `cache` at the batch's positions."""
    shape = slab.shape
    x = slab.embed(batch.token_ids, batch.positions, batch.groups)  # (R, D)
    for layer in range(shape.n_layer):
        block = f"h.{layer}"
        hidden = slab.layer_norm(f"{block}.ln_1", x, batch.groups)
        qkv = slab.linear(f"{block}.attn.c_attn", hidden, batch.groups)  # (R, 3D)
        query, key, value = qkv.view(-1, 3, shape.n_head, shape.head_dim).unbind(1)  # each (R, H, hd)
        cache.write(layer, batch, key, value)
        mixed = _attend(cache, layer, query, batch, _attention_scale(slab, layer))
        x = x + slab.linear(f"{block}.attn.c_proj", mixed.flatten(1), batch.groups)
        hidden = slab.layer_norm(f"{block}.ln_2", x, batch.groups)
        hidden = F.gelu(slab.linear(f"{block}.mlp.c_fc", hidden, batch.groups), approximate=shape.gelu)
        x = x + slab.linear(f"{block}.mlp.c_proj", hidden, batch.groups)
    if not len(batch.head_rows):  # a step of prompt chunks alone
        return x.new_empty(0, shape.vocab_size, dtype=torch.float32)
    x = x.index_select(0, batch.head_rows)  # (N, D): logits cost most, so only where wanted
    x = slab.layer_norm("ln_f", x, batch.head_groups)
    return slab.head(x, batch.head_groups).float()


def _attention_scale(slab: Slab, layer: int) -> float:
    scale = slab.shape.head_dim**-0.5 if slab.shape.scale_attn_weights else 1.0
    return scale / (layer + 1) if slab.shape.scale_attn_by_inverse_layer_idx else scale


def _attend(cache: KVCache, layer: int, query: Tensor, batch: Batch, scale: float) -> Tensor:
    """Causal attention of ``(R, H, hd)`` queries over their own sequences' keys -> ``(R, H, hd)``."""
    out = torch.empty_like(query)
    if cache.in_place:
        # One call a sequence beats one call for all on a CPU: nothing is copied or masked (8 models x 4 texts of 60
        # tokens, bf16: a step of 145 ms against 154; x 1 text: 113 against 151).
        for row, kv_row, length in batch.decode:
            keys, values = cache.view(layer, kv_row, length)
            one = query[row].view(1, *query.shape[1:]).unsqueeze(2)  # (1, H, 1, hd)
            out[row] = F.scaled_dot_product_attention(one, keys, values, scale=scale)[0, :, 0]
    elif len(batch.decode_rows):
        keys, values = cache.gather(layer, batch.decode_kv, batch.decode_mask.shape[-1])
        ones = query.index_select(0, batch.decode_rows).unsqueeze(2)  # (B, H, 1, hd)
        mixed = F.scaled_dot_product_attention(ones, keys, values, attn_mask=batch.decode_mask, scale=scale)
        out[batch.decode_rows] = mixed.squeeze(2)
    for first, end, kv_row, past in batch.prefill:
        keys, values = cache.view(layer, kv_row, past + end - first)
        span = query[first:end].transpose(0, 1).unsqueeze(0)  # (1, H, T, hd)
        mask = None if past == 0 else _causal_mask(end - first, past, query.device)
        mixed = F.scaled_dot_product_attention(span, keys, values, attn_mask=mask, is_causal=past == 0, scale=scale)
        out[first:end] = mixed.squeeze(0).transpose(0, 1)
    return out


def _causal_mask(num_rows: int, past: int, device: torch.device) -> Tensor:
    """(T, past + T) bool: row i sees keys 0 .. past + i."""
    return torch.ones(num_rows, past + num_rows, dtype=torch.bool, device=device).tril(past)
