"""What every route needs: the parts behind the API, and the limits in front of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from serve.api.access import Access
from serve.api.quota import Quota
from serve.api.readiness import Readiness
from serve.metrics import Metrics
from serve.types import Catalogue, Eraser, Files, Generator, Jobs, ModelInfo, Puller


class Preview(Protocol):
    """What a bot would learn from files. Blocks."""

    def __call__(
        self, paths: Sequence[Path], handle: Sequence[str | None], /, *, filenames: Sequence[str]
    ) -> Mapping[str, Any]:
        """`handle`: whose the first files are, in order; `filenames`: as users call them.

        Raises: BadUpload, InvalidRequest.
        """


class DrawPreview(Protocol):
    """Draws the picture of a bot. Blocks."""

    def __call__(self, info: ModelInfo, avatars: Sequence[bytes], text: str, /, *, prompt: str) -> bytes:
        """A PNG of `text`, which begins with `prompt`, and of the bot's faces, the first handles' first."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much and how long a caller may ask; everything beyond is refused with a clear answer."""

    json_bytes: int = 1 << 20
    upload_bytes: int = 512_000_000
    prompt_bytes: int = 256 << 10  # no fewer than one prompt can use: 2048 tokens of at most 128 bytes
    prompts: int = 64
    sequences: int = 128  # prompts times choices
    new_tokens: int = 65_536  # sequences times max tokens: 64 whole contexts of GPT-2
    read_s: float = 30.0  # between two pieces of a request body
    json_read_s: float = 30.0  # a whole JSON body
    generate_s: float = 600.0  # a whole generation, a cold start included: the openai client's own timeout
    ready_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Service:
    """The parts, wired once at start-up and handed to every router."""

    generator: Generator
    catalogue: Catalogue
    files: Files
    jobs: Jobs
    upload_dir: Path
    default_base: str
    readiness: Readiness
    metrics: Metrics
    limits: Limits = field(default_factory=Limits)
    preview: Preview | None = None  # None: nobody can look into archives here
    draw_preview: DrawPreview | None = None  # None: pictures stay as they were made
    puller: Puller | None = None  # None: there is no Hub
    eraser: Eraser | None = None  # None: nobody can be erased here
    access: Access = field(default_factory=Access)
    quota: Quota = field(default_factory=Quota)
