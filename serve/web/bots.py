"""A bot as pages show it: what it is called, whose face it has, where it is found."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

from serve.types import ModelId, ModelInfo

_MAX_FACES = 3


@dataclass(frozen=True, slots=True)
class BotView:
    """One model of the catalogue."""

    info: ModelInfo

    @property
    def id(self) -> str:
        return self.info.model_id

    @property
    def url(self) -> str:
        return f"/bots/{quote(self.id)}"

    @property
    def name(self) -> str:
        """ "Ada Lovelace & Bob"; the id's own name where nobody's name is known."""
        handles = self.info.handles
        if not handles:
            return ModelId.parse(self.id).name
        return " & ".join(self.info.names.get(handle) or handle for handle in handles)

    @property
    def handle(self) -> str:
        """ "@ada & @bob"; "" of a model that is nobody's."""
        return " & ".join(f"@{handle}" for handle in self.info.handles)

    @property
    def subtitle(self) -> str:
        """Its handle; of a model that is nobody's, its id, or who made it where the id is its whole name."""
        return self.handle or (self.id if self.id != self.name else f"by {self.info.owned_by}")

    @property
    def is_bot(self) -> bool:
        return bool(self.info.handles)

    @property
    def mark(self) -> str:
        """What must stand wherever it speaks."""
        return "AI CYBORG" if len(self.info.handles) > 1 else "AI BOT" if self.is_bot else "AI MODEL"

    @property
    def kept(self) -> int | None:
        """Posts that it learnt from."""
        counts = [of["kept"] for of in self.info.counts.values() if "kept" in of]
        return sum(counts) if counts else None

    @property
    def faces(self) -> list[str]:
        """Addresses of its faces, one at least."""
        base = f"/v1/models/{quote(self.id)}%40{self.info.revision}/avatar"
        return [f"{base}?number={number}" for number in range(min(_MAX_FACES, max(1, self.info.num_avatars)))]
