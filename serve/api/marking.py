"""What tells a program that a text was written by a machine: a header of each answer, and an object in its body.

The EU's AI Act (Regulation 2024/1689, article 50) asks for a mark that machines can read. Both OpenAI's and Hugging
Face's clients pass on, or leave out, what they do not know of a body.
"""

from __future__ import annotations

from typing import Any

HEADERS = {"x-ai-generated": "true"}
FIELD = "rookery"


def mark(model_id: str, revision: str | None) -> dict[str, Any]:
    """Of a text by this model, as `FIELD` of the object that holds it."""
    return {"ai_generated": True, "bot": model_id, "revision": revision}
