"""Whether a revision's files are still the bytes that were published, by hashes that were taken then.

The name of a revision that was made here is the hash of its files. That of one from a Hub is the Hub's, so its files'
hash is written beside them when it comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from serve.store.describe import provenance_of
from serve.store.model_files import PROVENANCE, content_hash

CONTENT = "content_hash"  # in the provenance of what is from a Hub: of all files but that one


def is_intact(folder: Path, known: Mapping[str, str] | None = None) -> bool | None:
    """Whether the files of a revision's folder are as they were; None where nothing tells how they were.

    `known`: the sha256 of files that need not be read. Raises: FileNotFoundError when it goes away meanwhile.
    """
    provenance = provenance_of(folder)
    if provenance.get("source") != "hub":
        return content_hash(folder, known) == folder.name
    promised = provenance.get(CONTENT)
    return None if promised is None else content_hash(folder, known, without=(PROVENANCE,)) == promised
