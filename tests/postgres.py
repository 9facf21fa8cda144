"""A real PostgreSQL server for tests: made in a folder of its own, on a free port of this machine alone."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from itertools import count
from pathlib import Path

from sqlalchemy import create_engine, text

_START_TIMEOUT_S = 30.0


def is_installed() -> bool:
    return all(shutil.which(name) for name in ("initdb", "postgres"))


class PostgresServer:
    """One server; every `create_database` is an empty one. `fsync=False`: quick, and gone with the machine."""

    def __init__(self, *, fsync: bool = False) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="rookery-postgres-"))
        self._data = self._folder / "data"
        self._names = count()
        # The server refuses to run as root.
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(self._folder, self._user)
        self._run_initdb()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._switches = [] if fsync else ["-c", "fsync=off", "-c", "synchronous_commit=off"]
        self.start()

    def _run_initdb(self) -> None:
        command = ["initdb", "-D", str(self._data), "-U", "rookery", "-A", "trust", "-E", "UTF8", "--no-sync"]
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        subprocess.run(
            command, check=True, user=self._user, cwd=self._folder, env=environment, stdout=subprocess.DEVNULL
        )

    def start(self) -> None:
        """Returns when it answers."""
        network = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self._folder}"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ["postgres", "-D", str(self._data), "-p", str(self.port), *network, *self._switches],
                user=self._user,
                cwd=self._folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        engine = create_engine(self.url("postgres"))
        while True:
            try:
                with engine.connect():
                    break
            except Exception:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
            time.sleep(0.05)
        engine.dispose()

    def url(self, name: str) -> str:
        return f"postgresql+psycopg://rookery@127.0.0.1:{self.port}/{name}"

    def create_database(self) -> str:
        """Its URL."""
        name = f"rookery_{next(self._names)}"
        engine = create_engine(self.url("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return self.url(name)

    def stop(self) -> None:
        """At once: connections break, as they do when a server is restarted."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(30)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(30)
        shutil.rmtree(self._folder, ignore_errors=True)
