"""`rookery keys`: the keys of a server, made and revoked in its database, and whether a server takes the one sent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deployments import show
from deployments.cli.app import SERVICE, Exit, command, group
from deployments.cli.options import (
    DEFAULT_URL,
    AsJson,
    Data,
    Url,
    console,
    print_json,
    remark,
    remarks,
    settings_of,
    tell,
)
from deployments.client import Client
from serve.types import ApiKey, KeyLimits, Scope

if TYPE_CHECKING:
    from serve.keys.table import KeyTable

_SCOPES = ",".join((Scope.GENERATE, Scope.READ, Scope.TRAIN))
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_UNITS_BYTES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

keys = group(
    SERVICE,
    "keys",
    """
    export ROOKERY_API_KEY=$(rookery keys create --name lina --scopes admin)
    rookery keys ls
    rookery keys check
    """,
    about="Make, list, revoke and renew the keys of a server, or check the one that is sent.",
)

_KeyId = Annotated[str, typer.Argument(metavar="ID", help="As 'rookery keys ls' shows it.")]


def _seconds(text: str) -> int:
    """Of "30d", "12h", "15m", "45s" or "0". Raises: BadParameter."""
    found = re.fullmatch(r"(\d{1,9})([smhd])|0", text)
    if not found:
        raise typer.BadParameter(f"{text!r} is no time; write it as 30d, 12h, 15m, 45s or 0.")
    return int(found[1] or 0) * _UNITS_S[found[2] or "s"]


def _bytes(text: str) -> int:
    """Of "500MB", "20GB" or a plain number. Raises: BadParameter."""
    found = re.fullmatch(r"(\d{1,15})(|KB|MB|GB|TB)", text.upper())
    if not found:
        raise typer.BadParameter(f"{text!r} is no size; write it as 500MB, 20GB or a number of bytes.")
    return int(found[1]) * _UNITS_BYTES[found[2]]


def _scopes(text: str) -> frozenset[Scope]:
    try:
        return frozenset(Scope(one.strip().lower()) for one in text.split(","))
    except ValueError as exc:
        raise typer.BadParameter(f"they are: {', '.join(Scope)}; several with commas between.") from exc


@command(
    SERVICE,
    """
    rookery keys create --name lina --scopes admin
    export ROOKERY_API_KEY=$(rookery keys create --name lina --scopes admin)
    rookery keys create --name shop --scopes generate --expires 90d --requests-per-s 5 --tokens-per-min 20000
    rookery keys create --name class --tenant school --storage 20GB --jobs 5 --json
    """,
    of=keys,
)
def create(
    name: Annotated[str, typer.Option(help="What it is for; shown in the list.")] = "",
    scopes: Annotated[str, typer.Option(help="What it may do: generate, read, train, admin.")] = _SCOPES,
    tenant: Annotated[
        str, typer.Option(help="Whose bots, files and jobs its are; keys of one tenant share them. Default: its own.")
    ] = "",
    expires: Annotated[str, typer.Option(help="After which time it ends: 30d, 12h. Default: never.")] = "",
    requests_per_s: Annotated[float | None, typer.Option(min=0, help="0: any number.")] = None,
    tokens_per_min: Annotated[int | None, typer.Option(min=0, help="Of prompts and texts. 0: any number.")] = None,
    in_flight: Annotated[int | None, typer.Option(min=0, help="Generations at once. 0: any number.")] = None,
    jobs: Annotated[int | None, typer.Option(min=0, help="Training jobs that have not ended. 0: any number.")] = None,
    storage: Annotated[str, typer.Option(help="Of its files and models: 500MB, 20GB. 0: any amount.")] = "",
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Print a new key, this once; the database knows only its hash. A service that runs takes it within a second.

    From the first key on, nobody does without one what the server does not open to everybody. Limits that are not named
    are the server's: ROOKERY_REQUESTS_PER_S and so on.
    """
    limits = KeyLimits(requests_per_s, tokens_per_min, in_flight, jobs, _bytes(storage) if storage else None)
    key, text = _table(data).create(
        name,
        scopes=_scopes(scopes),
        tenant=tenant,
        limits=limits,
        expires_in_s=_seconds(expires) if expires else None,
    )
    _print_new(key, text, as_json)


@command(
    SERVICE,
    """
    rookery keys ls
    rookery keys ls --json
    """,
    name="ls",
    of=keys,
)
def list_keys(data: Data = None, as_json: AsJson = False) -> None:
    """List all keys that were ever made, the oldest first; with --quiet their ids alone."""
    listed = [_key_json(stored.key) for stored in _table(data).read()]
    if as_json:
        return print_json({"object": "list", "data": listed})
    if remarks.quiet:
        return show.show_ids(console, listed)
    show.show_table(console, show.keys_table(listed))


@command(
    SERVICE,
    """
    rookery keys revoke key-1f2e3d4c5b6a
    rookery keys revoke key-1f2e3d4c5b6a --data ~/bots
    """,
    of=keys,
)
def revoke(key_id: _KeyId, data: Data = None, as_json: AsJson = False) -> None:
    """End a key for good; a service that runs takes it no more after a second."""
    key = _table(data).revoke(key_id)
    if as_json:
        return print_json(_key_json(key))
    tell(f"{key.id} is revoked.")


@command(
    SERVICE,
    """
    rookery keys rotate key-1f2e3d4c5b6a
    rookery keys rotate key-1f2e3d4c5b6a --grace 0
    """,
    of=keys,
)
def rotate(
    key_id: _KeyId,
    grace: Annotated[str, typer.Option(help="How long the old one goes on to work: 24h, 15m, 0.")] = "24h",
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Print a key anew, with another secret; its id, its owner and its limits stay."""
    key, text = _table(data).rotate(key_id, _seconds(grace))
    _print_new(key, text, as_json)


@command(
    SERVICE,
    """
    rookery keys check
    ROOKERY_API_KEY=rk-... rookery keys check --url https://bots.example.org
    """,
    of=keys,
)
def check(url: Url = DEFAULT_URL, as_json: AsJson = False) -> None:
    """Ask the server whether it takes the key in ROOKERY_API_KEY; ends with 4 where it does not."""
    with Client(url) as client, Client(url, key="") as stranger:
        client.status()  # another program may take any key
        has_key, is_taken, is_open = bool(client.key), client.takes_key(), stranger.takes_key()
    if as_json:
        print_json({"object": "key.check", "url": url, "sent": has_key, "accepted": is_taken, "needed": not is_open})
    elif is_open:
        tell(f"{url} asks for no key.")
    elif is_taken:
        tell(f"{url} takes the key in ROOKERY_API_KEY.")
    else:
        what = "does not take the key in" if has_key else "needs a key; set"
        typer.echo(f"rookery: {url} {what} ROOKERY_API_KEY.", err=True)
    if not is_taken:
        raise typer.Exit(Exit.KEY)


def _table(data: Path | None) -> KeyTable:
    from serve.keys.opening import open_key_table  # SQLAlchemy takes a while to import

    return open_key_table(settings_of(data))


def _print_new(key: ApiKey, text: str, as_json: bool) -> None:
    if as_json:
        return print_json({**_key_json(key), "key": text})
    typer.echo(text)
    remark(f"This is {key.id}, shown this once. The command sends it after: export ROOKERY_API_KEY=KEY")
    remark("Other clients send it as their api_key, or as the header 'Authorization: Bearer KEY'.")


def _key_json(key: ApiKey) -> dict[str, object]:
    limits = key.limits
    return {
        "id": key.id,
        "object": "key",
        "name": key.name,
        "tenant": key.tenant,
        "scopes": sorted(key.scopes),
        "limits": {
            "requests_per_s": limits.requests_per_s,
            "tokens_per_min": limits.tokens_per_min,
            "in_flight": limits.in_flight,
            "jobs": limits.jobs,
            "storage_bytes": limits.storage_bytes,
        },
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "last_used_at": key.last_used_at,
    }
