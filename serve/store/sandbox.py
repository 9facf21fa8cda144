"""Takes everything from this process that computing does not need, for good, before it reads a stranger's file.

What remains: memory up to a limit, time, threads, and the files that are already open. Two walls of the kernel:
seccomp admits the system calls listed here and no others, so that nothing can be opened, started, sent or signalled;
Landlock, where the kernel has it, denies every file, connection and signal once more. Knows nothing of weights.
Source: seccomp(2), landlock(7), linux/filter.h, linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What an interpreter with threads needs to compute on memory and on open files: name -> (x86_64, aarch64).
_ALLOWED = {
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "lseek": (8, 62),
    "close": (3, 57),
    "fstat": (5, 80),
    "fsync": (74, 82),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "set_tid_address": (218, 96),
    "membarrier": (324, 283),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "getcpu": (309, 168),
    "gettid": (186, 178),
    "getpid": (39, 172),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "getrandom": (318, 278),
    "sysinfo": (99, 179),
    "uname": (63, 160),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
# Allowed with some arguments only, see `_conditions`.
_CONDITIONAL = {
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "clone": (56, 220),
    "tgkill": (234, 131),
    "prlimit64": (302, 261),
    "fcntl": (72, 25),
    "newfstatat": (262, 79),
}
_CLONE3 = 435
_AUDIT_ARCH = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables above; linux/audit.h
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC = 1, 1
_KILL, _ALLOW, _ERRNO = 0x8000_0000, 0x7FFF_0000, 0x0005_0000
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06  # BPF: A = data[k], A &= k, A == k ? :, return k
_NUMBER, _ARCH = 0, 4  # places in struct seccomp_data

_PROT_EXEC = 0x4
_CLONE_THREAD, _CLONE_NEW = 0x0001_0000, 0x7E02_0000  # a thread, and none of the namespaces
_AT_EMPTY_PATH = 0x1000


class CannotConfine(Exception):
    """The kernel, or what it runs under, has no seccomp for us; the message says what it answered."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the process may still use. `memory_bytes` is beyond what it has mapped when it is confined."""

    memory_bytes: int
    file_bytes: int
    cpu_s: int


@dataclass(frozen=True, slots=True)
class Walls:
    """What the kernel granted. `landlock` is its version, 0 where there is none."""

    landlock: int


def confine(limits: Limits) -> Walls:
    """From here on: no file opened, no program or process started, nothing sent, nobody signalled. Cannot be undone.

    Files that are open stay readable and writable. Applies to every thread. Raises: CannotConfine.
    """
    if sys.platform != "linux" or platform.machine() not in _AUDIT_ARCH:
        raise CannotConfine(f"{sys.platform} on {platform.machine()} is not supported")
    libc = ctypes.CDLL(None, use_errno=True)
    # Both before the walls, which forbid them.
    _limit(limits)
    _prctl(libc, _PR_SET_PDEATHSIG, signal.SIGKILL)  # never longer alive than who waits for the result
    _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1)
    landlock = _deny_by_landlock(libc)
    _filter_system_calls(libc, platform.machine())
    return Walls(landlock)


def _limit(limits: Limits) -> None:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    wanted = {
        resource.RLIMIT_AS: mapped + limits.memory_bytes,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_CPU: limits.cpu_s,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in wanted.items():
        _, hard = resource.getrlimit(kind)
        most = sys.maxsize if hard == resource.RLIM_INFINITY else hard
        limit = min(limit, most)
        # The kernel says that time is up, and kills 5 s later.
        resource.setrlimit(kind, (limit, limit + 5 if kind == resource.RLIMIT_CPU and limit + 5 <= most else limit))


def _prctl(libc: ctypes.CDLL, option: int, value: int) -> None:
    if libc.prctl(option, *(ctypes.c_ulong(v) for v in (value, 0, 0, 0))):
        raise CannotConfine(f"prctl {option}: {os.strerror(ctypes.get_errno())}")


# --- Landlock -----------------------------------------------------------------------------------------------


def _deny_by_landlock(libc: ctypes.CDLL) -> int:
    """Forbids all that this kernel's version knows, and returns the version: 0 where it has none."""
    version: int = libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if version < 1:
        return 0
    # A ruleset without rules: what it handles is denied everywhere. Each version knows more rights and more fields.
    num_rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    files, tcp, scopes = (1 << num_rights) - 1, 0b11, 0b11
    fields = [files, *[tcp] * (version >= 4), *[scopes] * (version >= 6)]
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset: int = libc.syscall(
        _LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0)
    )
    if ruleset < 0:
        return 0
    failed = libc.syscall(_LANDLOCK_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint(0))
    os.close(ruleset)
    return 0 if failed else version


# --- seccomp ------------------------------------------------------------------------------------------------


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _filter_system_calls(libc: ctypes.CDLL, machine: str) -> None:
    column, arch = _AUDIT_ARCH[machine]
    code = b"".join(_instructions(column, arch))
    program = _Program(len(code) // 8, code)
    operation, flags = ctypes.c_uint(_SECCOMP_SET_MODE_FILTER), ctypes.c_uint(_SECCOMP_FILTER_FLAG_TSYNC)
    answer = libc.syscall(_SECCOMP[machine], operation, flags, ctypes.byref(program))
    if answer:  # positive: the thread that could not be taken along
        raise CannotConfine(f"seccomp: {os.strerror(ctypes.get_errno()) if answer < 0 else 'a thread is in the way'}")


def _instructions(column: int, arch: int) -> Iterator[bytes]:
    yield _bpf(_LOAD, _ARCH)
    yield _bpf(_EQUAL, arch, skip_if=1)
    yield _bpf(_RETURN, _KILL)  # numbers of another architecture mean other calls
    for numbers in _ALLOWED.values():
        yield from _if_number(numbers[column], [_bpf(_RETURN, _ALLOW)])
    for name, numbers in _CONDITIONAL.items():
        yield from _if_number(numbers[column], [*_conditions(name), _refusal(errno.EPERM)])
    # Its flags lie in memory, where no filter can look. The C library then falls back to `clone`.
    yield from _if_number(_CLONE3, [_refusal(errno.ENOSYS)])
    yield _refusal(errno.EPERM)


def _if_number(number: int, then: list[bytes]) -> Iterator[bytes]:
    """`then` must end in a return."""
    yield _bpf(_LOAD, _NUMBER)
    yield _bpf(_EQUAL, number, skip_else=len(then))
    yield from then


def _conditions(name: str) -> list[bytes]:
    """Returns "allow" where the arguments are harmless, and runs on otherwise."""
    match name:
        case "mmap" | "mprotect":  # no new machine code
            return _allow_if(_Argument(2, mask=_PROT_EXEC, equals=0))
        case "clone":
            return _allow_if(_Argument(0, mask=_CLONE_THREAD | _CLONE_NEW, equals=_CLONE_THREAD))
        case "tgkill":  # raise() and abort()
            return _allow_if(_Argument(0, equals=os.getpid()))
        case "prlimit64":  # reading one's own, as pthread_getattr_np does: the pointer to new ones is null
            return _allow_if(_Argument(0, equals=0), _Argument(2, equals=0), _Argument(2, equals=0, half=1))
        case "fcntl":  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL
            return _allow_if(_Argument(1, mask=0xFFFF_FFFC, equals=0))
        case "newfstatat":  # what the C library makes of fstat
            return _allow_if(_Argument(3, mask=_AT_EMPTY_PATH, equals=_AT_EMPTY_PATH))
    raise AssertionError(name)


@dataclass(frozen=True, slots=True)
class _Argument:
    """A condition on 32 bits of an argument of a system call, `half` 1 being the upper ones."""

    index: int
    equals: int
    mask: int = 0xFFFF_FFFF
    half: int = 0


def _allow_if(*conditions: _Argument) -> list[bytes]:
    code = [_bpf(_RETURN, _ALLOW)]
    for condition in reversed(conditions):
        place = 16 + 8 * condition.index + 4 * condition.half
        test = [_bpf(_LOAD, place), _bpf(_AND, condition.mask), _bpf(_EQUAL, condition.equals, skip_else=len(code))]
        code = test + code
    return code


def _refusal(error: int) -> bytes:
    return _bpf(_RETURN, _ERRNO | error)


def _bpf(operation: int, operand: int, *, skip_if: int = 0, skip_else: int = 0) -> bytes:
    return struct.pack("=HBBI", operation, skip_if, skip_else, operand)
