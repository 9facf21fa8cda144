"""A store with a service over it, as the Hub's clients meet it, and who asks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import httpx

from serve.store.revisions import Store
from tests.fakes.generator import EchoGenerator
from tests.fakes.models import write_tiny_gpt2

MODEL = "huggingtweets/ada"
KEY = "key-of-ours"
WITH_KEY = {"authorization": f"Bearer {KEY}"}
STRANGER = {"authorization": "Bearer hf_of-somebody-else"}
CARD = """\
---
language: en
license: mit
tags:
- huggingtweets
widget:
- text: "My dream is"
---

# Ada
"""


@dataclass
class Hub:
    """A store, and the service over it."""

    store: Store
    generator: EchoGenerator
    url: str
    folder: Path

    def publish(
        self, model_id: str = MODEL, *, seed: int = 0, card: str = CARD, n_embd: int = 32, n_positions: int = 64
    ) -> str:
        """Another version; its revision."""
        staged = self.store.stage()
        write_tiny_gpt2(staged, seed=seed, n_embd=n_embd, n_positions=n_positions)
        (staged / "README.md").write_text(card)
        (staged / "runs").mkdir()
        (staged / "runs" / "train.json").write_text("{}")
        (staged / "predictions.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
        (staged / "rookery.json").write_text(
            json.dumps({"created_at": 1_700_000_000 + seed, "tags": ["huggingtweets"]})
        )
        return self.store.publish(model_id, staged).revision

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers={key.replace("_", "-"): value for key, value in headers.items()})
