"""Keys that live in memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from serve.types import ApiKey, Scope

OPERATOR = "operator"


class MemoryKeys:
    """Those given, each of which opens everything, and those that `add` makes of a tenant's."""

    def __init__(self, *texts: str) -> None:
        self._keys: dict[str, ApiKey] = {}
        for text in texts:
            self.add(text, OPERATOR, [Scope.ADMIN])

    def add(self, text: str, tenant: str, scopes: Collection[Scope]) -> MemoryKeys:
        self._keys[text] = ApiKey(f"key-{len(self._keys)}", text, tenant, frozenset(scopes), created_at=0)
        return self

    @property
    def are_needed(self) -> bool:
        return bool(self._keys)

    def find(self, sent: str) -> ApiKey | None:
        return self._keys.get(sent)

    def list_keys(self) -> Sequence[ApiKey]:
        return list(self._keys.values())
