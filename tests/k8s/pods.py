"""Pods without Kubernetes: processes with a network, an address, a /tmp and process numbers of their own.

A pod is what one `unshare` starts; it and all that runs in it end when the test's process ends, however that happens:
the kernel then kills every process of its namespace, and namespaces without processes vanish. Pods reach each other
over a bridge that leads nowhere else. It knows nothing of Ray. Needs Linux, root, and the package iproute2.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import IO, TypeVar

import psutil  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")

_SUBNET = "10.77.0."
_BRIDGE_ADDRESS = _SUBNET + "254"
_CLONE_NEWNET = 0x40000000  # of <linux/sched.h>

# Its name; what becomes /tmp, /etc/hosts and /etc/resolv.conf; then folders that are in /tmp and stay there.
# Nobody else may take up orphans, so the kernel does: SIGCHLD is ignored. `cat` ends with the test's process.
_INIT = """
set -e
hostname "$1"; tmp=$2 hosts=$3 resolver=$4; shift 4
mount --bind "$hosts" /etc/hosts
mount --bind "$resolver" /etc/resolv.conf
mount --rbind /tmp /mnt
mount --bind "$tmp" /tmp
for folder; do
    case $folder in /tmp/*) mkdir -p "$folder"; mount --bind "/mnt${folder#/tmp}" "$folder" ;; esac
done
umount -l /mnt
mount -t tmpfs -o size=256m,mode=1777 shm /dev/shm
ip link set lo up
echo begun
trap '' CHLD
exec cat > /dev/null
"""


def why_impossible() -> str:
    """Why this machine can have no pods; "" where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "pods need network namespaces, which only root on Linux can make"
    if missing := [name for name in ("ip", "unshare", "nsenter", "mount") if not shutil.which(name)]:
        return f"pods need {' and '.join(missing)}: apt-get install iproute2 util-linux"
    try:
        _run("unshare", "--net", "--pid", "--mount", "--fork", "ip", "link", "add", "probe", "type", "bridge")
    except subprocess.CalledProcessError as exc:
        return f"this machine gives no network namespaces: {exc.stderr.strip()}"
    return ""


class Pod:
    """One; `folder` has its /tmp and the output of what runs in it."""

    def __init__(self, name: str, folder: Path, hosts: Path, resolver: Path, keep: Sequence[Path]) -> None:
        self.name, self.folder, self.address = name, folder / name, ""
        (self.folder / "tmp").mkdir(parents=True)
        (self.folder / "tmp").chmod(0o1777)
        spaces = ["--net", "--pid", "--mount", "--uts", "--ipc", "--mount-proc", "--fork", "--kill-child"]
        with (self.folder / "init.log").open("wb") as log:
            self._unshare = subprocess.Popen(
                ["unshare", *spaces, "sh", "-c", _INIT, "sh", name, self.folder / "tmp", hosts, resolver, *keep],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the test, which ends its pods in its own order
            )
        assert self._unshare.stdout is not None
        if not self._unshare.stdout.readline():
            raise OSError(f"the pod {name} did not begin: {(self.folder / 'init.log').read_text()}")
        self.pid: int = psutil.Process(self._unshare.pid).children()[0].pid
        self._cable = ""

    def popen(
        self, *command: str | Path, env: Mapping[str, str] | None = None, out: IO[bytes] | int | None = None
    ) -> subprocess.Popen[str]:
        """Begins a process in the pod, of which `out` gets all that it says."""
        inside = ["nsenter", "--target", str(self.pid), "--net", "--pid", "--mount", "--uts", "--ipc", "--wdns=/", "--"]
        return subprocess.Popen(
            [*inside, *command],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT if out is not None else None,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str | Path, env: Mapping[str, str] | None = None, timeout_s: float = 60.0) -> str:
        """What a process in the pod says. Raises: RuntimeError with it when it fails."""
        process = self.popen(*command, env=env, out=subprocess.PIPE)
        try:
            said, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            raise RuntimeError(f"{self.name}: {shlex.join(map(str, command))} took more than {timeout_s:g} s: {said}")  # noqa: B904
        if process.returncode:
            raise RuntimeError(f"{self.name}: {shlex.join(map(str, command))} gave {process.returncode}: {said}")
        return said

    def call(self, function: Callable[[], T]) -> T:
        """A function of this process, but what it connects to is what the pod can reach."""
        return self.begin(function).result()

    def begin(self, function: Callable[[], T]) -> Future[T]:
        """The same in a thread that goes on."""
        future: Future[T] = Future()

        def work() -> None:
            try:
                _enter_network(self.pid)
                future.set_result(function())
            except BaseException as exc:
                future.set_exception(exc)

        Thread(target=work, name=f"in {self.name}", daemon=True).start()
        return future

    @property
    def is_alive(self) -> bool:
        return self._unshare.poll() is None

    def kill(self) -> None:
        """Every process of it at once, by SIGKILL: the kernel does that to a namespace whose first process dies."""
        if self.is_alive:
            os.kill(self.pid, signal.SIGKILL)
            self._unshare.wait(30)
        for stream in (self._unshare.stdin, self._unshare.stdout):
            assert stream is not None
            stream.close()


class Network:
    """A bridge, and the pods on it. All of it ends with the `with`, or with the process."""

    def __init__(self, folder: Path, keep: Sequence[Path] = ()) -> None:
        self.folder = folder
        self._keep = [folder, *keep, ROOT, Path(sys.prefix), Path(sys.base_prefix)]
        (folder / "hosts").write_text("127.0.0.1 localhost\n")
        (folder / "resolver").write_text(f"nameserver {_BRIDGE_ADDRESS}\n")
        self.names: dict[str, str] = {}  # what the pods' DNS knows: addresses by name
        self._count = 0
        self.pods: list[Pod] = []
        self._switch = self._pod("switch")
        self._ip(self._switch, "link", "add", "bridge", "type", "bridge")
        self._ip(self._switch, "address", "add", f"{_BRIDGE_ADDRESS}/24", "dev", "bridge")
        self._ip(self._switch, "link", "set", "bridge", "up")
        self._switch.begin(self._answer_questions)

    def pod(self, name: str) -> Pod:
        """One with an address; the others reach it by its name, too."""
        pod = self._pod(name)
        self._count += 1
        pod.address, cable = f"{_SUBNET}{self._count}", f"cable{self._count}"
        self._ip(self._switch, "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(pod.pid))
        self._ip(self._switch, "link", "set", cable, "master", "bridge", "up")
        self._ip(pod, "address", "add", f"{pod.address}/24", "dev", "eth0")
        self._ip(pod, "link", "set", "eth0", "up")
        self._ip(pod, "route", "add", "default", "via", _BRIDGE_ADDRESS)  # Ray asks it which address is its own
        pod._cable = cable
        self.names[name] = pod.address
        return pod

    def unplug(self, pod: Pod) -> None:
        """As when its machine loses its power: nothing more comes from it, not even the end of a connection."""
        self._ip(self._switch, "link", "set", pod._cable, "down")

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pod in reversed(self.pods):
            pod.kill()

    def _pod(self, name: str) -> Pod:
        pod = Pod(name, self.folder, self.folder / "hosts", self.folder / "resolver", self._keep)
        self.pods.append(pod)
        return pod

    def _answer_questions(self) -> None:
        """DNS, as far as Ray asks: gRPC takes names from nothing else."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind((_BRIDGE_ADDRESS, 53))
            server.settimeout(1.0)
            while self._switch.is_alive:
                with suppress(TimeoutError, ValueError, IndexError):
                    question, client = server.recvfrom(512)
                    server.sendto(_answer(question, self.names), client)

    @staticmethod
    def _ip(pod: Pod, *arguments: str) -> None:
        _run("nsenter", "--target", str(pod.pid), "--net", "ip", *arguments)


def _answer(question: bytes, names: Mapping[str, str]) -> bytes:
    """RFC 1035: the address of the one name that is asked for; no answer for other kinds, no such name for others."""
    labels, at = [], 12
    while length := question[at]:
        labels.append(question[at + 1 : at + 1 + length].decode())
        at += 1 + length
    asked = question[12 : at + 5]
    address = names.get(".".join(labels).lower())
    is_answered = address is not None and asked[-4:-2] == b"\0\1"  # an A record
    header = question[:2] + (b"\x85\x80" if address else b"\x85\x83") + bytes([0, 1, 0, is_answered, 0, 0, 0, 0])
    record = b"\xc0\x0c\0\1\0\1\0\0\0\5\0\4" + socket.inet_aton(address) if address and is_answered else b""
    return header + asked + record


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _enter_network(pid: int) -> None:
    """This thread's alone."""
    with open(f"/proc/{pid}/ns/net") as space:
        if _libc().setns(space.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def killed_at_end(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """With all of its process group."""
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
