"""The keys that the settings name: where they are kept, and those in the environment."""

from __future__ import annotations

from serve.database.connection import Database
from serve.keys.secret import read_server_secret
from serve.keys.store import KeyStore
from serve.keys.table import KeyTable
from serve.settings import Settings


def open_keys(settings: Settings) -> KeyStore:
    """Not yet followed. Raises: StoreUnavailable, InvalidRequest for a database that cannot be opened."""
    return KeyStore(Database(settings.sql_url), _secret_of(settings), split_keys(settings.api_keys))


def open_key_table(settings: Settings) -> KeyTable:
    """Raises: StoreUnavailable, InvalidRequest for a database that cannot be opened."""
    return KeyTable(Database(settings.sql_url), _secret_of(settings))


def split_keys(setting: str) -> list[str]:
    """Those in ROOKERY_API_KEYS, with commas between."""
    return [one for part in setting.split(",") if (one := part.strip())]


def _secret_of(settings: Settings) -> bytes:
    return read_server_secret(settings.key_secret, settings.data)
