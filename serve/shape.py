"""What a GPT-2 is, as numbers: its configuration, the tensors it must have, and what it costs in bytes.

A leaf: the store checks model folders against it before a byte is allocated, the engine lays out slots by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.errors import ModelUnusable

# Bounds of the GPT-2 family (xl: 48 layers, 1600 wide), checked before anything is allocated.
MAX_LAYERS, MAX_WIDTH, MAX_POSITIONS, MAX_VOCAB = 48, 1600, 2048, 300_000

_ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu": "none"}


@dataclass(frozen=True, slots=True)
class GPT2Shape:
    """Everything that two models must share to sit in one slab and run in one step."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    layer_norm_epsilon: float = 1e-5
    gelu: str = "tanh"  # torch's `approximate`
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GPT2Shape:
        """Reads a transformers ``config.json``. Raises: ModelUnusable saying what was expected and found."""
        kind = config.get("model_type")
        if kind != "gpt2":
            raise ModelUnusable(f"This is not a GPT-2 model: model_type is {str(kind)[:40]!r}, expected 'gpt2'.")
        if config.get("auto_map"):
            raise ModelUnusable("This model brings its own code ('auto_map'); only plain GPT-2 models are served.")
        if config.get("add_cross_attention"):
            raise ModelUnusable("This GPT-2 has cross attention; only decoder-only models are served.")
        n_embd = _bounded(config, "n_embd", 768, MAX_WIDTH)
        n_head = _bounded(config, "n_head", 12, MAX_WIDTH)
        if n_embd % n_head:
            raise ModelUnusable(f"n_embd ({n_embd}) is not a multiple of n_head ({n_head}).")
        activation = config.get("activation_function", "gelu_new")
        if not isinstance(activation, str) or activation not in _ACTIVATIONS:
            raise ModelUnusable(f"activation_function {str(activation)[:40]!r} is not one of {sorted(_ACTIVATIONS)}.")
        epsilon = config.get("layer_norm_epsilon", 1e-5)
        if not isinstance(epsilon, float) or not 0 < epsilon < 1:
            raise ModelUnusable(f"layer_norm_epsilon in config.json must lie between 0 and 1, not {str(epsilon)[:40]}.")
        inner = config.get("n_inner")
        return cls(
            vocab_size=_bounded(config, "vocab_size", 50257, MAX_VOCAB),
            n_positions=_bounded(config, "n_positions", 1024, MAX_POSITIONS),
            n_embd=n_embd,
            n_layer=_bounded(config, "n_layer", 12, MAX_LAYERS),
            n_head=n_head,
            n_inner=4 * n_embd if inner is None else _bounded(config, "n_inner", 0, 8 * MAX_WIDTH),
            layer_norm_epsilon=epsilon,
            gelu=_ACTIVATIONS[activation],
            scale_attn_weights=bool(config.get("scale_attn_weights", True)),
            scale_attn_by_inverse_layer_idx=bool(config.get("scale_attn_by_inverse_layer_idx", False)),
        )

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical names (no ``transformer.`` prefix) -> shapes, as transformers stores them.

        Matrices of the blocks are ``Conv1D``: ``[in, out]``. ``lm_head.weight`` is listed; where a file
        lacks it, it is tied to ``wte.weight``.
        """
        d, inner = self.n_embd, self.n_inner
        shapes: dict[str, tuple[int, ...]] = {
            "wte.weight": (self.vocab_size, d),
            "wpe.weight": (self.n_positions, d),
            "ln_f.weight": (d,),
            "ln_f.bias": (d,),
            "lm_head.weight": (self.vocab_size, d),
        }
        block: dict[str, tuple[int, ...]] = {
            "ln_1.weight": (d,),
            "ln_1.bias": (d,),
            "attn.c_attn.weight": (d, 3 * d),
            "attn.c_attn.bias": (3 * d,),
            "attn.c_proj.weight": (d, d),
            "attn.c_proj.bias": (d,),
            "ln_2.weight": (d,),
            "ln_2.bias": (d,),
            "mlp.c_fc.weight": (d, inner),
            "mlp.c_fc.bias": (inner,),
            "mlp.c_proj.weight": (inner, d),
            "mlp.c_proj.bias": (d,),
        }
        for layer in range(self.n_layer):
            shapes |= {f"h.{layer}.{name}": shape for name, shape in block.items()}
        return shapes

    @property
    def num_parameters(self) -> int:
        """Parameters of the tied model (``lm_head`` not counted twice)."""
        total = 0
        for name, shape in self.tensor_shapes().items():
            if name != "lm_head.weight":
                total += shape[0] * (shape[1] if len(shape) == 2 else 1)
        return total


def canonical_name(name: str) -> str | None:
    """A checkpoint's tensor name without its prefix; None for buffers that old checkpoints carry.

    ``attn.bias`` (the causal mask) and ``attn.masked_bias`` were saved by transformers before 4.29.
    """
    name = name.removeprefix("transformer.")
    return None if name.endswith((".attn.bias", ".attn.masked_bias")) else name


def _bounded(config: Mapping[str, Any], key: str, default: int, limit: int) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        raise ModelUnusable(f"{key} in config.json must be a whole number from 1 to {limit}, not {str(value)[:40]}.")
    return value
