"""What a confined process tries and cannot do, each in a real child; and what it still can."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the walls are Linux's")

# Everything is imported before, as a payload might find it.
SETUP = """
import ctypes, json, mmap, os, resource, signal, socket, struct, subprocess, sys, threading, time
from pathlib import Path
from serve.store import sandbox
from serve.store.sandbox import Limits, confine
libc = ctypes.CDLL(None, use_errno=True)
here = Path(sys.argv[1])
output = open(here / "output", "wb")
source = open(here / "source", "rb")
"""
# Says "refused" when the system refuses, else what it was given.
TRY = """
walls = confine(Limits(memory_bytes=2**29, file_bytes=2**20, cpu_s={cpu_s}))
try:
    result = attempt()
except (OSError, MemoryError, ValueError) as exc:
    result = f"refused: {{exc!r}}"
print(result, flush=True)
"""


@pytest.fixture
def folder() -> Any:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "source").write_bytes(b"weights")
        (Path(name) / "secret").write_bytes(b"secret")
        yield Path(name)


def attempt(folder: Path, body: str, *, cpu_s: int = 20, before: str = "") -> subprocess.CompletedProcess[str]:
    """Runs `body` as the function `attempt` of a confined child."""
    function = "def attempt():\n" + textwrap.indent(textwrap.dedent(body), "    ")
    script = SETUP + before + "\n" + function + TRY.format(cpu_s=cpu_s)
    return subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=60, cwd=Path.cwd()
    )


@pytest.fixture(params=["both walls", "without Landlock"])
def try_it(request: pytest.FixtureRequest, folder: Path) -> Callable[[str], str]:
    before = "sandbox._deny_by_landlock = lambda libc: 0" if request.param == "without Landlock" else ""

    def run(body: str) -> str:
        done = attempt(folder, body, before=before)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize(
    "body",
    [
        "return socket.socket()",
        "return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "return socket.socket(socket.AF_INET6)",
        "return socket.socket(socket.AF_UNIX)",
        "return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "return socket.socketpair()",
        "return os.fork()",
        "return os.posix_spawn('/bin/true', ['true'], {})",
        "return os.execv('/bin/true', ['true'])",
        "return subprocess.run(['true'])",
        "return os.open('/etc/passwd', os.O_RDONLY)",
        "return open(here / 'secret').read()",
        "return open(here / 'source').read()",
        "return open('/proc/self/environ').read()",
        "return open('/proc/self/mem', 'r+b')",
        "return os.listdir('/')",
        "return os.stat(here / 'secret')",
        "return os.readlink('/proc/self/exe')",
        "return open(here / 'new', 'w')",
        "return open(Path.home() / 'rookery-was-here', 'w')",
        "return os.open('/tmp', os.O_TMPFILE | os.O_WRONLY)",
        "return os.mkdir(here / 'new')",
        "return os.unlink(here / 'secret')",
        "return os.rename(here / 'secret', here / 'new')",
        "return os.link(here / 'secret', here / 'new')",
        "return os.symlink('/etc', here / 'new')",
        "return os.chmod(here / 'secret', 0o777)",
        "return os.truncate(here / 'secret', 0)",
        "return os.mkfifo(here / 'new')",
        "return os.utime(here / 'secret')",
        "return os.kill(parent, signal.SIGTERM)",
        "return signal.pidfd_send_signal(handle, signal.SIGTERM)",
        "return os.setpriority(os.PRIO_PROCESS, parent, 19)",
        "return resource.prlimit(parent, resource.RLIMIT_NOFILE, (10, 10))",
        "return resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
        "return os.memfd_create('x')",
        "return mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)",
        "return bytearray(2**30)",
    ],
)
def test_confined_process_is_refused(folder: Path, body: str) -> None:
    before = "parent = os.getppid(); handle = os.pidfd_open(parent)"
    done = attempt(folder, body, before=before)
    assert done.stdout.startswith("refused"), (done.stdout, done.stderr[-500:])
    assert sorted(path.name for path in folder.iterdir()) == ["output", "secret", "source"]
    assert (folder / "secret").read_bytes() == b"secret" and not (Path.home() / "rookery-was-here").exists()


# System calls that Python has no name for, x86_64's and aarch64's numbers, with arguments that would do if allowed.
RAW = {
    "ptrace": ((101, 117), "16, parent, 0, 0"),
    "process_vm_readv": ((310, 270), "parent, 0, 0, 0, 0, 0"),
    "process_vm_writev": ((311, 271), "parent, 0, 0, 0, 0, 0"),
    "io_uring_setup": ((425, 425), "8, ctypes.create_string_buffer(120)"),
    "bpf": ((321, 280), "0, 0, 0"),
    "userfaultfd": ((323, 282), "1"),
    "perf_event_open": ((298, 241), "0, 0, -1, -1, 0"),
    "unshare": ((272, 97), "0x10000000"),
    "keyctl": ((250, 219), "0, -3, 0"),
    "clone3": ((435, 435), "ctypes.create_string_buffer(64), 64"),
    "openat2": ((437, 437), "-100, b'/etc/passwd', ctypes.create_string_buffer(24), 24"),
    "seccomp": ((317, 277), "1, 0, 0"),
    "rt_tgsigqueueinfo": ((297, 240), "parent, parent, 15, 0"),
    "tgkill of another": ((234, 131), "parent, parent, 15"),
    "clone of a process": ((56, 220), "17, 0, 0, 0, 0"),
    "execveat": ((322, 281), "-100, b'/bin/true', 0, 0, 0"),
}


def test_raw_system_calls_are_refused(folder: Path) -> None:
    column = 1 if os.uname().machine == "aarch64" else 0
    calls = "".join(f"    {name!r}: libc.syscall({n[column]}, {arguments}),\n" for name, (n, arguments) in RAW.items())
    body = f"return json.dumps({{\n{calls}}})"
    done = attempt(folder, body, before="parent = os.getppid()")
    assert json.loads(done.stdout) == dict.fromkeys(RAW, -1), done.stderr[-500:]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86_64's second set of numbers")
def test_numbers_of_another_architecture_do_not_open_the_wall(folder: Path) -> None:
    done = attempt(folder, "return libc.syscall(0x40000000 + 41, 2, 1, 0)")  # x32's socket
    assert done.stdout.strip() == "-1"


def test_second_wall_holds_alone(folder: Path) -> None:
    """Files, connections and signals by Landlock, were there a hole in the list of system calls."""
    before = "parent = os.getppid(); sandbox._filter_system_calls = lambda libc, machine: None;client = socket.socket()"
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        bodies = [
            "return open(here / 'secret').read()",
            "return open(here / 'new', 'w')",
            "return os.mkdir(here / 'new')",
            "return os.unlink(here / 'secret')",
            "return os.truncate(here / 'secret', 0)",
            "return os.execv('/bin/true', ['true'])",
            f"return client.connect({server.getsockname()!r})",
            "return os.kill(parent, 0)",
        ]
        walls = attempt(folder, "return walls.landlock", before=before).stdout
        if int(walls) < 6:
            pytest.skip(f"this kernel's Landlock is version {walls.strip()}")
        for body in bodies:
            assert attempt(folder, body, before=before).stdout.startswith("refused"), body


def test_confined_process_still_computes(try_it: Callable[[str], str]) -> None:
    """It reads and writes what is open, takes memory, and starts threads: torch's own too."""
    assert try_it("return source.read(), output.write(b'x' * 1000), output.flush()").startswith("(b'weights', 1000")
    threads = """
        done = []
        threads = [threading.Thread(target=done.append, args=(i,)) for i in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        return sorted(done), len(bytearray(2**26)), time.sleep(0.01), os.urandom(1) != b""
    """
    assert try_it(threads).strip() == "([0, 1, 2, 3], 67108864, None, True)"


def test_torch_computes_in_parallel_when_confined(folder: Path) -> None:
    before = "import torch; torch.set_num_threads(4)"
    body = "a = torch.ones(2000, 500); return float((a * 2).sum()), torch.get_num_threads()"
    assert attempt(folder, body, before=before).stdout.strip() == "(2000000.0, 4)"


def test_file_that_grows_without_end_ends_the_process(folder: Path) -> None:
    done = attempt(folder, "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\nwhile True: output.write(b'x' * 2**16)")
    assert done.returncode == -signal.SIGXFSZ and (folder / "output").stat().st_size == 2**20


def test_loop_without_end_ends_the_process(folder: Path) -> None:
    assert attempt(folder, "while True: pass", cpu_s=1).returncode == -signal.SIGXCPU


@pytest.mark.slow
def test_loop_that_ignores_the_warning_is_killed(folder: Path) -> None:
    body = "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert attempt(folder, body, cpu_s=1).returncode == -signal.SIGKILL


def test_process_does_not_outlive_who_waits_for_it(folder: Path) -> None:
    """The parent is killed while its child is confined and asleep; the child's end of the pipe then closes."""
    child = SETUP + "confine(Limits(2**28, 2**20, 60)); print('ready', flush=True); time.sleep(60)"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])"
    process = subprocess.Popen([sys.executable, "-c", parent, child, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"ready\n"
    process.kill()
    assert process.communicate(timeout=10)[0] == b""
