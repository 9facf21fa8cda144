"""One step of huggingtweets' recipe: AdamW without decay, gradients clipped to a norm of 1, in bf16 or float32.

Weights and moments are float32: bf16 ones would swallow steps this small. What multiplies is a copy, made once a step.
Knows no texts and no schedule.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from serve.shape import GPT2Shape
from serve.training.gpt2 import GPT2, Dropout, Weights

MAX_NORM = 1.0
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


class Learner:
    """A model that learns. `model` computes with the weights as they are now, in `dtype`."""

    def __init__(
        self, shape: GPT2Shape, weights: Weights, device: torch.device, dtype: torch.dtype, dropout: Dropout, seed: int
    ) -> None:
        self.weights = weights.like(weights.flat.to(device))
        self._gradients = weights.like(torch.zeros_like(self.weights.flat))
        copy = self.weights if dtype == torch.float32 else weights.like(self.weights.flat.to(dtype))
        self.model = GPT2(shape, copy)
        self._dropout, self._seed, self._step = dropout, seed, 0
        parameter = torch.nn.Parameter(self.weights.flat)
        parameter.grad = self._gradients.flat
        self._optimizer = torch.optim.AdamW(
            [parameter], betas=(_BETA1, _BETA2), eps=_EPSILON, weight_decay=0.0, fused=True
        )
        self._optimizer.state[parameter] = {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(self.weights.flat),
            "exp_avg_sq": torch.zeros_like(self.weights.flat),
        }
        self._moments = self._optimizer.state[parameter]

    def step(self, ids: Tensor, learning_rate: float) -> Tensor:
        """Learns from ``(B, T)`` ids; the loss before, on the device: to read it is to wait for it."""
        if self._dropout:
            torch.manual_seed(self._seed * 1_000_003 + self._step)  # so that a step draws the same when resumed
        loss = self.model.loss_and_gradients(ids, self._gradients, self._dropout)
        norm = torch.linalg.vector_norm(self._gradients.flat)
        # The fused step divides by it in its own pass over the gradients.
        self._optimizer.grad_scale = ((norm + 1e-6) / MAX_NORM).clamp_min(1.0)  # type: ignore[attr-defined]
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()
        if self.model.weights is not self.weights:
            self.model.weights.flat.copy_(self.weights.flat)
        self._step += 1
        return loss

    def state(self) -> dict[str, Tensor]:
        """All that a later `step` depends on, by reference."""
        step = torch.tensor(self._step)
        moments = {name: self._moments[name] for name in ("exp_avg", "exp_avg_sq")}
        return {"weights": self.weights.flat, **moments, "step": step}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self._step = int(state["step"])
        self._moments["step"].fill_(self._step)
        if self.model.weights is not self.weights:
            self.model.weights.flat.copy_(self.weights.flat)
