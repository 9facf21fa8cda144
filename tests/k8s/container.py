"""A program in an image, as a cluster's node would start it, without a container engine.

Linux's own namespaces: its own processes, network (loopback alone) and mounts; the image's files read-only, the user
and the environment that the image names, no capability and no way to one. What it lacks: cgroups, seccomp, other
nodes. Needs root. Knows nothing of what is in the image.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_DEVICES = {"null": 3, "zero": 5, "full": 7, "random": 8, "urandom": 9}  # minor numbers of major 1
# Waits: the namespaces live as long as it does, and whoever it loses is its child.
_FIRST = "ip link set lo up && echo up && exec sleep infinity"


@dataclass(frozen=True, slots=True)
class Image:
    """What of an image's configuration matters to whoever starts it."""

    root: Path
    user: str
    environment: Mapping[str, str]
    entrypoint: Sequence[str]
    command: Sequence[str]
    folder: str


class Container:
    """Namespaces of an image, to start programs in."""

    def __init__(self, image: Image, pid: int, root: Path) -> None:
        self._image, self._pid, self._root = image, pid, root

    def arguments(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, *, is_first: bool = False
    ) -> list[str]:
        """What starts `command` inside, as the image's user."""
        uid, _, gid = self._image.user.partition(":")
        named = {**self._image.environment, **(environment or {})}
        inner = f"cd {shlex.quote(self._image.folder)} && exec {shlex.join(command)}"
        own = ("unshare", "--mount", "--pid", "--fork", "--kill-child", f"--mount-proc={self._root}/proc")
        return [
            *("nsenter", f"--target={self._pid}", "--mount", "--pid", "--net", "--ipc", "--uts"),
            *(own if is_first else ()),
            *("chroot", str(self._root), "setpriv", f"--reuid={uid}", f"--regid={gid or uid}", "--clear-groups"),
            *("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"),
            *("env", "-i", *(f"{name}={value}" for name, value in named.items()), "/bin/sh", "-c", inner),
        ]

    def start(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """As the first process of its own, which adopts what others leave. Its output goes to `log`."""
        with log.open("ab") as out:
            return subprocess.Popen(
                self.arguments(command, environment, is_first=True), stdout=out, stderr=subprocess.STDOUT
            )

    def run(
        self, *command: str, timeout_s: float = 60, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.arguments(command, environment), capture_output=True, text=True, timeout=timeout_s, check=False
        )


@contextlib.contextmanager
def running(image: Image, volumes: Sequence[str]) -> Iterator[Container]:
    """A container with an empty folder of the user's at each of `volumes`; whatever runs in it ends with it."""
    with tempfile.TemporaryDirectory(prefix="rookery-container-") as folder:
        root = Path(folder)
        (image.root / "etc" / "hosts").write_text("127.0.0.1 localhost\n")  # as every engine gives one
        script = " && ".join([*_mounts(image, root, volumes), _FIRST])
        # --kill-child: with the first process all others of the namespace are killed.
        holder = subprocess.Popen(
            [
                *("unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child"),
                "sh",
                "-ec",
                script,
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert holder.stdout is not None
            if holder.stdout.readline() != "up\n":
                raise OSError(f"no namespaces: {script} ended with status {holder.wait()}")
            yield Container(image, _child(holder.pid), root)
        finally:
            holder.kill()
            holder.wait()


def _child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0])


def _mounts(image: Image, root: Path, volumes: Sequence[str]) -> list[str]:
    uid, _, gid = image.user.partition(":")
    at = shlex.quote(str(root))
    private = f"mode=0750,uid={uid},gid={gid or uid}"
    return [
        "mount --make-rprivate /",
        f"mount --bind {shlex.quote(str(image.root))} {at}",
        f"mount -o remount,bind,ro {at}",
        f"mount -t proc proc {at}/proc",
        f"mount -t tmpfs -o mode=0755 tmpfs {at}/dev",
        *(f"mknod -m 666 {at}/dev/{name} c 1 {minor}" for name, minor in _DEVICES.items()),
        f"mkdir {at}/dev/shm",
        f"mount -t tmpfs -o mode=1777 tmpfs {at}/dev/shm",
        f"mount -t tmpfs -o mode=1777 tmpfs {at}/tmp",
        *(f"mount -t tmpfs -o {private} tmpfs {at}{volume}" for volume in volumes),
    ]


def is_root() -> bool:
    return os.geteuid() == 0
