"""What a process did to a folder, call by call, and what a disk may hold of that when the power goes.

`record` runs a command under strace. `Log.crash` gives the folder as it may be found after a cut behind any call. What
was synced is there: a file's bytes by its own fsync, the names of a folder by the folder's. Of the rest anything may be
there or not, in any order: names without bytes, bytes with holes, a rename or none. A rename is one step, as every
journal has it; nothing else is ordered.

What is written through a map is not seen: SQLite's shared memory alone, which it makes anew.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Loss = Literal["all", "bytes", "names", "some", "none"]
"""What is lost of what was not synced: all; bytes alone; names alone; each call or not, by lot; nothing."""

LOSSES: tuple[Loss, ...] = ("all", "bytes", "names", "some", "none")

_CALLS = (
    "open,openat,creat,write,pwrite64,ftruncate,lseek,rename,renameat,renameat2,link,linkat,unlink,unlinkat,mkdir,"
    "mkdirat,rmdir,symlink,symlinkat,fsync,fdatasync,sendfile,copy_file_range,fallocate,writev,pwritev,pwritev2,"
    "sync_file_range,truncate"
)
_UNKNOWN = {"copy_file_range", "fallocate", "writev", "pwritev", "pwritev2", "sync_file_range", "truncate"}
_LINE = re.compile(r"(\d+)\s+(\w+)\((.*)\)\s+= (-?\d+|0x[0-9a-f]+)")
_ARGUMENT = re.compile(
    r'"((?:\\x[0-9a-f]{2})*)"|(?:(\d+|AT_FDCWD)<((?:\\x[0-9a-f]{2})*)>(?:\(deleted\))?)|([^,\s][^,]*)'
)


@dataclass(eq=False)
class Node:
    """A file, a folder or a link, whatever it is called."""

    kind: Literal["file", "folder", "link"]
    target: str = ""
    names: dict[str, Node] = field(default_factory=dict)  # of a folder, as they are


@dataclass(frozen=True, slots=True)
class Name:
    """`node` is called `name` in `folder` from now on; None: nothing is. `gone`: where it no longer is."""

    folder: Node
    name: str
    node: Node | None
    gone: tuple[Node, str] | None = None


@dataclass(frozen=True, slots=True)
class Bytes:
    """Of a file, from `offset` on; None: it ends there."""

    node: Node
    offset: int
    content: bytes | None


@dataclass(frozen=True, slots=True)
class Sync:
    node: Node


Call = Name | Bytes | Sync | str
"""Text is what the process told."""


def record(command: Sequence[str], folder: Path, trace: Path) -> Log:
    """Runs a command that writes into `folder`, which is empty, and tells its progress by lines on stdout.

    It must write in one process. Raises: CalledProcessError; ValueError for a call that is not understood.
    """
    strace = ["strace", "-f", "-y", "-xx", "-s", str(2**28), "-o", str(trace), "-e", f"trace={_CALLS}", "--"]
    subprocess.run([*strace, *command], check=True, stdout=subprocess.DEVNULL)
    log = Log(folder)
    for line in _whole_lines(trace):
        log.read(line)
    return log


def _whole_lines(trace: Path) -> Iterator[str]:
    """Calls that another thread's interrupt are put together again."""
    begun: dict[str, str] = {}
    with trace.open(encoding="ascii") as lines:
        for line in lines:
            pid = line.split(None, 1)[0]
            if line.endswith("<unfinished ...>\n"):
                begun[pid] = line.removesuffix("<unfinished ...>\n")
            elif (found := re.match(r"\d+\s+<\.\.\. \w+ resumed>(.*)", line)) is not None:
                yield begun.pop(pid) + found[1]
            else:
                yield line


class Log:
    """The calls about one folder, in their order."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self.root = Node("folder")
        self.calls: list[Call] = []
        self._open: dict[int, tuple[Node, bool]] = {}  # descriptor -> what it is, and whether it appends
        self._offsets: dict[int, int] = {}
        self._sizes: dict[Node, int] = {}

    # --- Reading ----------------------------------------------------------------------------------------------

    def read(self, line: str) -> None:
        found = _LINE.match(line)
        if found is None or found[4].startswith("-"):  # the end of a process, or a call that failed
            return
        call, result = found[2], int(found[4], 0)
        texts, numbers = list[str](), list[str]()
        for text, _, path, other in _ARGUMENT.findall(found[3]):
            (numbers if other else texts).append(other or _decode(text or path))
        arguments = _ARGUMENT.findall(found[3])
        if call in ("open", "openat", "creat"):
            self._opened(self._path(arguments), numbers, result)
        elif arguments[0][1] == "1" and call == "write":
            self.calls += [_decode(arguments[1][0]).strip()] if result else []
        elif call in ("write", "pwrite64", "ftruncate", "lseek", "fsync", "fdatasync"):
            self._used(call, int(arguments[0][1]), arguments, result)
        elif call == "sendfile":
            self._sent(arguments, found[3], result)
        elif call in _UNKNOWN:
            if any(self._is_inside(text) for text in texts):
                raise ValueError(f"{call} is not understood: {line[:200]}")
        else:
            self._named(call, arguments)

    def _opened(self, path: str, numbers: Sequence[str], descriptor: int) -> None:
        self._open.pop(descriptor, None)
        if not self._is_inside(path):
            return
        flags = numbers[0]
        folder, name = self._place(path)
        node = self.root if path == self._folder else folder.names.get(name)
        if node is not None and node.kind == "link":
            node = self._place(f"{path.rpartition('/')[0]}/{node.target}")[0].names.get(node.target)
        if node is None:
            if "O_CREAT" not in flags:  # made before it was watched, or by others
                return
            node = self._name(folder, name, Node("file"))
        elif "O_TRUNC" in flags:
            self._write(node, 0, None)
        self._open[descriptor] = node, "O_APPEND" in flags
        self._offsets[descriptor] = 0

    def _used(self, call: str, descriptor: int, arguments: Sequence[tuple[str, ...]], result: int) -> None:
        if descriptor not in self._open or not self._is_inside(_decode(arguments[0][2])):
            return
        node, appends = self._open[descriptor]
        if call in ("fsync", "fdatasync"):
            self.calls.append(Sync(node))
        elif call == "lseek":
            self._offsets[descriptor] = result
        elif call == "ftruncate":
            self._write(node, int(arguments[1][3]), None)
        else:
            content = bytes.fromhex(arguments[1][0].replace("\\x", ""))[:result]
            at = self._sizes.get(node, 0) if appends else self._offsets[descriptor]
            if call == "pwrite64":
                at = int(arguments[3][3])
            else:
                self._offsets[descriptor] = at + result
            self._write(node, at, content)

    def _sent(self, arguments: Sequence[tuple[str, ...]], said: str, result: int) -> None:
        """Bytes of a file elsewhere, which is there still. A call that sends nothing is the last."""
        target, source = int(arguments[0][1]), Path(_decode(arguments[1][2]))
        if target in self._open and result:
            start = re.search(r"\[(\d+)\]", said)
            assert start is not None and not self._is_inside(str(source)), said
            self._write(self._open[target][0], self._offsets[target], source.read_bytes()[int(start[1]) :][:result])
            self._offsets[target] += result

    def _named(self, call: str, arguments: Sequence[tuple[str, ...]]) -> None:
        paths = list(self._paths(arguments))
        if not any(self._is_inside(path) for path in paths):
            return
        folder, name = self._place(paths[-1])
        if call.startswith("rename"):
            source, old = self._place(paths[0])
            node = source.names.pop(old)
            folder.names[name] = node
            self.calls.append(Name(folder, name, node, (source, old)))
        elif call.startswith("link"):
            source, old = self._place(paths[0])
            self._name(folder, name, source.names[old])
        elif call.startswith("symlink"):
            self._name(folder, name, Node("link", _decode(arguments[0][0])))
        elif call.startswith("mkdir"):
            self._name(folder, name, Node("folder"))
        else:
            assert call in ("unlink", "unlinkat", "rmdir"), call
            self._name(folder, name, None)

    def _name(self, folder: Node, name: str, node: Node | None) -> Node:
        if node is None:
            folder.names.pop(name, None)
        else:
            folder.names[name] = node
        self.calls.append(Name(folder, name, node))
        return node or folder

    def _write(self, node: Node, offset: int, content: bytes | None) -> None:
        end = offset if content is None else max(self._sizes.get(node, 0), offset + len(content))
        self._sizes[node] = end
        self.calls.append(Bytes(node, offset, content))

    def _is_inside(self, path: str) -> bool:
        return path == self._folder or path.startswith(f"{self._folder}/")

    def _place(self, path: str) -> tuple[Node, str]:
        """The folder that a path leads to, through links as well, and the last name of it."""
        if not self._is_inside(path) or path == self._folder:
            return Node("folder"), ""
        node, parts = self.root, path.removeprefix(f"{self._folder}/").split("/")
        for part in parts[:-1]:
            child = node.names[part]
            node = node.names[child.target] if child.kind == "link" else child
        return node, parts[-1]

    def _path(self, arguments: Sequence[tuple[str, ...]]) -> str:
        return next(iter(self._paths(arguments)))

    def _paths(self, arguments: Sequence[tuple[str, ...]]) -> Iterator[str]:
        """Those that a call names, each with the folder before it, if it is relative."""
        base = ""
        for text, number, path, _ in arguments:
            if number:
                base = _decode(path)
            elif text:
                yield os.path.normpath(os.path.join(base or self._folder, _decode(text)))

    # --- Crashing ---------------------------------------------------------------------------------------------

    def crash(self, end: int, loss: Loss, lot: random.Random) -> Tree:
        """The folder after a cut behind the first `end` calls."""
        calls = self.calls[:end]
        synced = _synced(calls)
        tree = Tree()
        for number, call in enumerate(calls):
            if isinstance(call, str | Sync):
                continue
            is_kept = synced[number] or loss == "none" or (loss == "some" and lot.random() < 0.5)
            if isinstance(call, Name):
                if is_kept or loss == "bytes":
                    tree.name(call)
            elif is_kept or loss == "names":
                content = call.content
                if content and loss == "some" and not synced[number] and lot.random() < 0.5:
                    content = content[: lot.randrange(len(content))]
                tree.write(call.node, call.offset, content)
        return tree

    def told(self, end: int) -> list[str]:
        """What the process had told before the cut."""
        return [call for call in self.calls[:end] if isinstance(call, str)]


def _synced(calls: Sequence[Call]) -> list[bool]:
    """Of each call, whether it is on the disk for sure."""
    later, known = set[Node](), [False] * len(calls)
    for number in range(len(calls) - 1, -1, -1):
        call = calls[number]
        if isinstance(call, Sync):
            later.add(call.node)
        elif isinstance(call, Name):
            known[number] = call.folder in later or (call.gone is not None and call.gone[0] in later)
        elif isinstance(call, Bytes):
            known[number] = call.node in later
    return known


class Tree:
    """What a disk holds: names and bytes."""

    def __init__(self) -> None:
        self._names: dict[Node, dict[str, Node]] = {}
        self._contents: dict[Node, bytearray] = {}

    def name(self, call: Name) -> None:
        if call.gone is not None:
            source, old = call.gone
            if self._names.get(source, {}).get(old) is call.node:
                del self._names[source][old]
        names = self._names.setdefault(call.folder, {})
        if call.node is None:
            names.pop(call.name, None)
        else:
            names[call.name] = call.node

    def write(self, node: Node, offset: int, content: bytes | None) -> None:
        """With zeros for what was never written before it."""
        held = self._contents.setdefault(node, bytearray())
        if len(held) < offset:
            held.extend(bytes(offset - len(held)))
        if content is None:
            del held[offset:]
        else:
            held[offset : offset + len(content)] = content

    def lay_out(self, root: Node, folder: Path) -> None:
        """Makes it real below `folder`, which need not be there."""
        folder.mkdir()
        for name, node in self._names.get(root, {}).items():
            if node.kind == "folder":
                self.lay_out(node, folder / name)
            elif node.kind == "link":
                (folder / name).symlink_to(node.target)
            else:
                (folder / name).write_bytes(self._contents.get(node, b""))


def _decode(text: str) -> str:
    return bytes.fromhex(text.replace("\\x", "")).decode("utf-8", "replace")
