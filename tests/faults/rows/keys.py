"""Keys that do not open, asked of a live service; and what the time of a comparison tells."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from serve.database.connection import Database
from serve.keys.opening import open_key_table
from serve.keys.secret import as_text, new_secret
from serve.keys.store import KeyStore
from serve.keys.table import KeyTable
from serve.settings import Settings
from serve.types import Scope
from tests.deployments.conftest import BASE, ROOKERY, import_tiny_model, start_service, stop_service
from tests.faults.row import Measured, row

_ADDRESS = "/v1/fine_tuning/jobs"  # takes a key, whoever may do what without
_COMPARISONS = 200_000  # of each kind
_BATCH = 50  # timed together: one takes about as long as to read the clock twice
_MAX_RATIO = 1.05
_MAX_REVOKED_S = 1.0
_LARGE = "k" * (1 << 20)


@row(
    "B13",
    did="no key, malformed, wrong scheme, 1 MB, in the address, revoked, another tenant's; compares timed",
    expected="401, 400 for an address, 404 for others' ids, dead in 1 s; medians within 5 %",
    minutes=3,
)
def keys_that_do_not_open(folder: Path, share: float) -> Measured:
    import_tiny_model(folder / "data", BASE)
    service = start_service(folder / "data", "--gateways", "2", ROOKERY_API_KEYS="operator's", ROOKERY_ANONYMOUS="")
    try:
        ada, eve = (_create(service.data, tenant) for tenant in ("ada", "eve"))
        with httpx.Client(base_url=service.url, timeout=30) as client:
            _wait_until_open(client, eve)
            sent = list(_wrong(client, ada, share))
            seen = _seen_by_another_tenant(client, ada, eve)
            revoked_s = _revoked_after(client, service.data, ada)
            still_open = client.get(_ADDRESS, headers=_bearer(eve)).status_code == 200
    finally:
        stop_service(service)
    wrong = {name: got for name, expected, got in sent if got not in expected}
    first, last = _timed(folder)
    ratio = max(first, last) / min(first, last)
    holds = not wrong and not seen and revoked_s <= _MAX_REVOKED_S and still_open and ratio <= _MAX_RATIO
    return Measured(
        f"{len(sent) - len(wrong)} of {len(sent)} refused so; {len(seen)} of another's things seen; a revoked key dead "
        f"after {revoked_s:.2f} s on both gateways; medians of {_COMPARISONS:,} differ by {100 * (ratio - 1):.1f} %",
        holds,
        {"wrong": wrong, "seen": seen, "first_ns": first, "last_ns": last},
    )


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def _create(data: Path, tenant: str) -> str:
    command = [*ROOKERY, "keys", "create", "--tenant", tenant, "--data", str(data)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _wait_until_open(client: httpx.Client, key: str) -> None:
    deadline = time.monotonic() + 5
    while any(client.get(_ADDRESS, headers=_bearer(key)).status_code != 200 for _ in range(8)):
        if time.monotonic() > deadline:
            raise TimeoutError("a new key opens nothing after 5 s")
        time.sleep(0.05)


def _wrong_headers(key: str, share: float) -> Iterator[tuple[str, dict[str, str]]]:
    yield "none", {}
    yield "large", _bearer(_LARGE)
    for name, value in {
        "empty": "",
        "no scheme": key,
        "basic": f"Basic {key}",
        "digest": f"Digest {key}",
        "two keys": f"Bearer {key}, Bearer {key}",
        "quoted": f'Bearer "{key}"',
        "bearer alone": "Bearer",
        "upper": f"Bearer {key.upper()}",
        "cut": f"Bearer {key[:-1]}",
        "longer": f"Bearer {key}A",
        "only the id": f"Bearer {key[:15]}",
    }.items():
        yield name, {"authorization": value}
    for number in range(max(10, round(500 * share))):
        guess = as_text("key-" + key[3:15], new_secret())
        yield f"guess {number}", _bearer(guess)


def _wrong(client: httpx.Client, key: str, share: float) -> Iterator[tuple[str, tuple[int, ...], int]]:
    for name, headers in _wrong_headers(key, share):
        refusals = (400, 401, 413, 431) if name == "large" else (401,)
        yield name, refusals, _status(client, _ADDRESS, headers)
    for field in ("api_key", "key", "access_token"):
        yield f"?{field}=", (400,), _status(client, f"{_ADDRESS}?{field}={key}", {})
        yield f"?{field}= beside a good one", (400,), _status(client, f"{_ADDRESS}?{field}={key}", _bearer(key))


def _status(client: httpx.Client, address: str, headers: dict[str, str]) -> int:
    """As the client sees it; 431 where the connection is closed in the middle of a head that is too large."""
    try:
        return client.get(address, headers=headers).status_code
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        return 431


def _seen_by_another_tenant(client: httpx.Client, owner: str, other: str) -> list[str]:
    """Addresses of `owner`'s things that do not answer `other` as if there were nothing."""
    made = client.post("/v1/files", headers=_bearer(owner), files={"file": ("a.zip", b"said")}).json()["id"]
    never = "file-" + "0" * len(made.removeprefix("file-"))
    seen = []
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        real, none = (client.request(method, f"/v1/files/{id}{path}", headers=_bearer(other)) for id in (made, never))
        if real.status_code != 404 or real.text.replace(made, never) != none.text:
            seen.append(f"{method} {path}")
    if made in client.get("/v1/files", headers=_bearer(other)).text:
        seen.append("the list")
    assert client.get(f"/v1/files/{made}", headers=_bearer(owner)).status_code == 200
    return seen


def _revoked_after(client: httpx.Client, data: Path, key: str) -> float:
    """Seconds from its end in the database until no gateway takes the key; each request may meet another one."""
    open_key_table(Settings(data=data)).revoke(f"key-{key[3:15]}")
    revoked = last_taken = time.monotonic()
    while time.monotonic() < revoked + 3:
        if client.get(_ADDRESS, headers={**_bearer(key), "connection": "close"}).status_code == 200:
            last_taken = time.monotonic()
    return last_taken - revoked


def _timed(folder: Path) -> tuple[float, float]:
    """Medians, in nanoseconds of this thread, for keys that are wrong in their first and in their last character."""
    database = Database(f"sqlite:///{folder}/timed.db")
    _, text = KeyTable(database, b"secret").create("", scopes={Scope.READ})
    store = KeyStore(database, b"secret")
    secret_at = len("rk-") + 12 + 1
    wrong = [_changed(text, secret_at), _changed(text, len(text) - 1)]
    took: tuple[list[float], list[float]] = ([], [])
    for number in range(2 * _COMPARISONS // _BATCH):
        which = number % 2
        started = time.thread_time_ns()
        for _ in range(_BATCH):
            store.find(wrong[which])
        took[which].append((time.thread_time_ns() - started) / _BATCH)
    database.close()
    return statistics.median(took[0]), statistics.median(took[1])


def _changed(text: str, at: int) -> str:
    return text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]
