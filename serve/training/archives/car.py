"""Bluesky's repository export: a CAR file of blocks, of which a Merkle search tree says which are records.

Blocks are kept in a temporary file and not in memory; each is checked against its hash, and what the tree does not
reach is not given. Knows no posts. Source: atproto.com/specs/repository, ipld.io/specs/transport/car/carv1.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import libipld

from serve.errors import BadUpload
from serve.training.archives.json_stream import as_list, as_mapping, as_text
from serve.training.archives.spool import Spool

# The protocol's own limit for a record; as Python objects it takes up to 56 times as many bytes.
MAX_BLOCK_BYTES = 2**20
MAX_BLOCKS = 10_000_000
_MAX_VARINT_BYTES = 9
_MAX_KEY_BYTES = 1024
_MAX_PENDING = 100_000  # subtrees and records still to come; a real tree is some 20 levels deep
_CID = re.compile(rb"\x01[\x55\x71]\x12\x20(.{32})", re.DOTALL)  # version 1, raw or DAG-CBOR, SHA-256 of 32 bytes
_CID_BYTES = 36

Entry = tuple[str, bytes]  # "<collection>/<record key>", CID of the record


def looks_like_car(head: bytes) -> bool:
    """A header is a CBOR map of `roots` and `version`."""
    return b"eroots" in head[:128] and b"gversion" in head[:128]


class Repository:
    """The records of one account. Raises: BadUpload, here and while it is gone through."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._name = name
        self._blocks = Spool("CREATE TABLE blocks (cid BLOB PRIMARY KEY, data BLOB)")
        root = self._read_blocks(stream)
        commit = self._decode(self._find(root) or b"")
        did, tree = as_text(commit.get("did")), commit.get("data")
        if did is None or not isinstance(tree, bytes):
            raise self._refusal("its root is no commit")
        self.did, self._tree = did, tree

    def entries(self) -> Iterator[Entry]:
        """In order of their keys. Each subtree is gone into once, however often nodes name it."""
        pending: list[bytes | Entry] = [self._tree]  # what comes next is last
        last = ""
        while pending:
            item = pending.pop()
            if isinstance(item, bytes):
                pending += reversed(self._items_of(self._take_node(item)))
                if len(pending) > _MAX_PENDING:
                    raise self._refusal("its tree is too deep")
            elif item[0] <= last:
                raise self._refusal("the keys of its tree are not in order")
            else:
                last = item[0]
                yield item

    def record(self, cid: bytes) -> Mapping[str, Any] | None:
        """None where its block is absent."""
        data = self._find(cid)
        return None if data is None else self._decode(data)

    # --- Blocks -----------------------------------------------------------------------------------------------

    def _read_blocks(self, stream: BinaryIO) -> bytes:
        """Keeps all blocks; gives the CID of the root."""
        header = self._decode(self._read_section(stream) or b"")
        roots = as_list(header.get("roots"))
        if header.get("version") != 1 or len(roots) != 1 or not isinstance(roots[0], bytes):
            raise self._refusal("its header is not that of a repository")
        num_blocks = 0
        while (section := self._read_section(stream)) is not None:
            cid, data = section[:_CID_BYTES], section[_CID_BYTES:]
            match, num_blocks = _CID.fullmatch(cid), num_blocks + 1
            if match is None or num_blocks > MAX_BLOCKS:
                raise self._refusal(f"block {num_blocks:,} has no name that we know, or there are too many")
            if hashlib.sha256(data).digest() != match[1]:
                raise self._refusal(f"block {num_blocks:,} is not what its hash says")
            self._blocks.run("INSERT OR IGNORE INTO blocks VALUES (?, ?)", cid, data)
        return _bare(roots[0])

    def _read_section(self, stream: BinaryIO) -> bytes | None:
        """A length as a varint, then as many bytes; None at the end of the file."""
        num_bytes = 0
        for place in range(_MAX_VARINT_BYTES):
            byte = stream.read(1)
            if not byte and place == 0:
                return None
            num_bytes |= (byte[0] & 0x7F if byte else 0) << 7 * place
            if not byte or byte[0] < 0x80:
                break
        data = stream.read(num_bytes) if 0 < num_bytes <= MAX_BLOCK_BYTES + _CID_BYTES else b""
        if not data or len(data) < num_bytes:
            raise self._refusal("it is cut off, or a block of it is too large")
        return data

    def _find(self, cid: bytes) -> bytes | None:
        row = self._blocks.run("SELECT data FROM blocks WHERE cid = ?", _bare(cid)).fetchone()
        return row[0] if row else None

    def _decode(self, data: bytes) -> Mapping[str, Any]:
        try:
            return as_mapping(libipld.decode_dag_cbor(data))
        except (ValueError, RecursionError, OverflowError) as exc:
            raise self._refusal("a block of it is not DAG-CBOR") from exc

    # --- The tree ---------------------------------------------------------------------------------------------

    def _take_node(self, cid: bytes) -> Mapping[str, Any]:
        data = self._find(cid)
        if data is None:
            raise self._refusal("a node of its tree is absent, or is named twice")
        self._blocks.run("DELETE FROM blocks WHERE cid = ?", _bare(cid))
        return self._decode(data)

    def _items_of(self, node: Mapping[str, Any]) -> list[bytes | Entry]:
        """The subtree before, then each entry and the subtree after it. Keys share a beginning with the one before."""
        items: list[bytes | Entry] = [node["l"]] if isinstance(node.get("l"), bytes) else []
        key = b""
        for entry in map(as_mapping, as_list(node.get("e"))):
            num_shared, rest, cid, after = (entry.get(field) for field in "pkvt")
            if not isinstance(num_shared, int) or not isinstance(rest, bytes) or not isinstance(cid, bytes):
                raise self._refusal("a node of its tree is not one")
            key = key[: max(num_shared, 0)] + rest
            if num_shared > len(key) or len(key) > _MAX_KEY_BYTES or not key.isascii():
                raise self._refusal("a key of its tree is none")
            items.append((key.decode("ascii"), cid))
            if isinstance(after, bytes):
                items.append(after)
        return items

    def _refusal(self, reason: str) -> BadUpload:
        return BadUpload(f"{self._name} is not a sound Bluesky repository: {reason}. Download it anew.", param="file")


def _bare(cid: bytes) -> bytes:
    """Without the zero that comes before a CID inside of DAG-CBOR, which decoders may leave."""
    return cid[1:] if cid.startswith(b"\0") else cid
