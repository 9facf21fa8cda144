"""Models, files and versions as the Hugging Face Hub tells of them.

What a model says itself (its card, its config, the header of its weights) was written by strangers: it is read within
bounds, and what cannot be read is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from serve.api.hub_card import read_card
from serve.types import PREVIEW_PROMPT, Catalogue, ModelId, ModelInfo, RepoFile, RevisionInfo

PIPELINE_TAG = "text-generation"
LIBRARY = "transformers"
COMMON_TAGS = (LIBRARY, "safetensors", "gpt2", PIPELINE_TAG)  # of every model here, as the Hub itself derives them

_TRANSFORMERS_INFO: Mapping[str, str] = {
    "auto_model": "AutoModelForCausalLM",
    "pipeline_tag": PIPELINE_TAG,
    "processor": "AutoTokenizer",
}

_MAX_JSON_BYTES = 1 << 20
_MAX_HEADER_BYTES = 16 << 20  # of safetensors
_MAX_TAGS = 200


class Repo:
    """One revision of a model. What is not in the catalogue's entry is read when somebody asks for it."""

    def __init__(self, info: ModelInfo, catalogue: Catalogue) -> None:
        self.info = info
        self._catalogue = catalogue
        self._named = f"{info.model_id}@{info.revision}"

    @cached_property
    def files(self) -> dict[str, RepoFile]:
        """Without their digests."""
        return {file.name: file for file in self._catalogue.list_files(self._named)}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The part of config.json that the Hub shows."""
        found = self._read_json("config.json")
        tokens = self._read_json("tokenizer_config.json")
        return {
            **_pick(found, "architectures", "model_type", "task_specific_params"),
            "tokenizer_config": _pick(tokens, "bos_token", "eos_token", "unk_token", "pad_token"),
        }

    @cached_property
    def card(self) -> dict[str, Any]:
        """The front matter of README.md."""
        file = self.files.get("README.md")
        return {} if file is None else read_card(file)

    @cached_property
    def safetensors(self) -> dict[str, Any] | None:
        """How many parameters there are of each type, by the header of the weights."""
        file = self.files.get("model.safetensors")
        size = int.from_bytes(_read_start(file, 8)[:8], "little")
        if file is None or not 0 < size <= _MAX_HEADER_BYTES:
            return None
        counts: dict[str, int] = {}
        try:
            header = json.loads(_read_start(file, 8 + size)[8:])
            for name, tensor in header.items():
                if name != "__metadata__":
                    num_elements = _product(tensor["shape"])
                    counts[str(tensor["dtype"])] = counts.get(str(tensor["dtype"]), 0) + num_elements
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return {"parameters": counts, "total": sum(counts.values())}

    @property
    def tags(self) -> list[str]:
        """Those of every model here, its own, and what follows from its card."""
        return _unique([*quick_tags(self.info), *_texts(self.card.get("tags")), *_derived_tags(self.card)])

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads(_read_start(self.files.get(name), _MAX_JSON_BYTES))
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


def quick_tags(info: ModelInfo) -> list[str]:
    """Without a look at the files: those that the list can be filtered by."""
    return _unique([*COMMON_TAGS, *info.tags])


def summary_json(info: ModelInfo) -> dict[str, Any]:
    """An entry of the list."""
    return {
        "_id": _object_id(info.model_id),
        "id": info.model_id,
        "modelId": info.model_id,
        "author": ModelId.parse(info.model_id).namespace,
        "sha": info.revision,
        "createdAt": iso_time(info.created_at),
        "lastModified": iso_time(info.created_at),
        "private": info.is_private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "trendingScore": 0,
        "tags": quick_tags(info),
        "pipeline_tag": PIPELINE_TAG,
        "library_name": LIBRARY,
    }


# The Hub's `expand`: the name of a property, and where its value comes from.
PROPERTIES: Mapping[str, Callable[[Repo], Any]] = {
    "author": lambda repo: ModelId.parse(repo.info.model_id).namespace,
    "baseModels": lambda repo: [repo.info.base_model] if repo.info.base_model else [],
    "cardData": lambda repo: repo.card,
    "childrenModelCount": lambda repo: 0,
    "config": lambda repo: repo.config,
    "createdAt": lambda repo: iso_time(repo.info.created_at),
    "disabled": lambda repo: False,
    "downloads": lambda repo: 0,
    "downloadsAllTime": lambda repo: 0,
    "evalResults": lambda repo: [],
    "gated": lambda repo: False,
    "gguf": lambda repo: None,
    "inference": lambda repo: None,
    "inferenceProviderMapping": lambda repo: [],
    "lastModified": lambda repo: iso_time(repo.info.created_at),
    "library_name": lambda repo: LIBRARY,
    "likes": lambda repo: 0,
    "mask_token": lambda repo: None,
    "model-index": lambda repo: None,
    "pipeline_tag": lambda repo: PIPELINE_TAG,
    "private": lambda repo: repo.info.is_private,
    "resourceGroup": lambda repo: None,
    "safetensors": lambda repo: repo.safetensors,
    "sha": lambda repo: repo.info.revision,
    "siblings": lambda repo: [{"rfilename": name} for name in repo.files],
    "spaces": lambda repo: [],
    "tags": lambda repo: repo.tags,
    "transformersInfo": lambda repo: dict(_TRANSFORMERS_INFO),
    "trendingScore": lambda repo: 0,
    "usedStorage": lambda repo: repo.info.num_bytes,
    "widgetData": lambda repo: _widget_data(repo.card),
}

_DETAILS = (
    *("cardData", "config", "inference", "mask_token", "model-index", "safetensors", "siblings", "spaces", "tags"),
    *("transformersInfo", "usedStorage", "widgetData"),
)


def expanded_json(repo: Repo, names: Iterable[str]) -> dict[str, Any]:
    """The model's id, and the properties `names` alone."""
    identity = {"_id": _object_id(repo.info.model_id), "id": repo.info.model_id, "modelId": repo.info.model_id}
    return identity | {name: PROPERTIES[name](repo) for name in names}


def details_json(repo: Repo) -> dict[str, Any]:
    """A model looked at alone."""
    return summary_json(repo.info) | {name: PROPERTIES[name](repo) for name in _DETAILS}


def sibling_json(file: RepoFile) -> dict[str, Any]:
    """A file among its model's, with its digests."""
    found: dict[str, Any] = {"rfilename": file.name, "blobId": file.blob_id, "size": file.num_bytes}
    if file.sha256:
        pointer_size = len(file.lfs_pointer)
        found["lfs"] = {"sha256": file.sha256, "size": file.num_bytes, "pointerSize": pointer_size}
    return found


# --- Files ------------------------------------------------------------------------------------------------


def etag(file: RepoFile) -> str:
    """As the Hub names its content, without quotes."""
    return file.sha256 or file.blob_id


class Tree:
    """The folders and files of a revision, as git sees them."""

    def __init__(self, files: Sequence[RepoFile]) -> None:
        self._files = {file.name: file for file in files}
        self._folders: dict[str, set[str]] = {"": set()}  # path -> the paths right below it
        for name in self._files:
            parts = name.split("/")
            for depth in range(len(parts)):
                below = "/".join(parts[: depth + 1])
                self._folders.setdefault("/".join(parts[:depth]), set()).add(below)

    def has_folder(self, path: str) -> bool:
        return path in self._folders

    def below(self, folder: str, *, is_recursive: bool) -> list[str]:
        """Paths of what is in it, folders before what they hold."""
        found = sorted(self._folders[folder])
        if not is_recursive:
            return found
        return [
            path
            for child in found
            for path in (child, *(self.below(child, is_recursive=True) if child in self._folders else ()))
        ]

    def __contains__(self, path: str) -> bool:
        return path in self._files or (path in self._folders and path != "")

    def entry_json(self, path: str, last_commit: Mapping[str, Any] | None) -> dict[str, Any]:
        """`last_commit`: told with the entry where it was asked for."""
        found: dict[str, Any]
        if path in self._folders:
            found = {"type": "directory", "oid": self._tree_id(path), "size": 0, "path": path}
            return found | ({"lastCommit": last_commit} if last_commit else {})
        file = self._files[path]
        found = {"type": "file", "oid": file.blob_id, "size": file.num_bytes, "path": path}
        if file.sha256:
            pointer_size = len(file.lfs_pointer)
            found["lfs"] = {"oid": file.sha256, "size": file.num_bytes, "pointerSize": pointer_size}
        if last_commit:
            unscanned = {"status": "unscanned", "avScan": None, "pickleImportScan": None}
            found |= {"lastCommit": last_commit, "securityFileStatus": unscanned}
        return found

    def _tree_id(self, folder: str) -> str:
        entries = []
        for path in self._folders[folder]:
            is_folder, name = path in self._folders, path.rpartition("/")[2]
            own_id = self._tree_id(path) if is_folder else self._files[path].blob_id
            mode = "40000" if is_folder else "100644"
            order = name + "/" * is_folder  # git's
            entries.append((order, f"{mode} {name}\0".encode() + bytes.fromhex(own_id)))
        content = b"".join(entry for _, entry in sorted(entries))
        return hashlib.sha1(b"tree %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


# --- Versions ---------------------------------------------------------------------------------------------


def commit_title(info: RevisionInfo) -> str:
    """One line on how a version came about."""
    if info.step is not None:
        return f"Step {info.step} of training {info.job_id or 'elsewhere'}"
    return f"Trained by {info.job_id}" if info.job_id else "Published"


def commit_json(info: RevisionInfo, author: str, *, is_formatted: bool) -> dict[str, Any]:
    """A version as the Hub tells of a commit."""
    title = commit_title(info)
    found: dict[str, Any] = {
        "id": info.revision,
        "title": title,
        "message": "",
        "authors": [{"user": author, "avatar": ""}],
        "date": iso_time(info.created_at),
    }
    return found | ({"formatted": {"title": title, "message": ""}} if is_formatted else {})


def last_commit_json(info: ModelInfo) -> dict[str, Any]:
    """Of any file: a revision is one whole."""
    return {"id": info.revision, "title": "Published", "date": iso_time(info.created_at)}


def iso_time(unix_s: int) -> str:
    """With the Hub's three digits of milliseconds."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


# --- What strangers wrote ---------------------------------------------------------------------------------


def _read_start(file: RepoFile | None, num_bytes: int) -> bytes:
    if file is None:
        return b""
    try:
        with open(file.open(), "rb") as opened:
            return opened.read(num_bytes)
    except OSError:
        return b""


def _derived_tags(card: Mapping[str, Any]) -> list[str]:
    licenses = [f"license:{one}" for one in _texts(card.get("license"))]
    data_sets = [f"dataset:{one}" for one in _texts(card.get("datasets"))]
    bases = [
        tag for one in _texts(card.get("base_model")) for tag in (f"base_model:{one}", f"base_model:finetune:{one}")
    ]
    return [*_texts(card.get("language")), *licenses, *data_sets, *bases, "endpoints_compatible", "region:us"]


def _widget_data(card: Mapping[str, Any]) -> list[Any]:
    widget = card.get("widget")
    return widget if isinstance(widget, list) and widget else [{"text": PREVIEW_PROMPT}]


def _pick(found: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: found[name] for name in names if name in found}


def _texts(value: Any) -> list[str]:
    found = value if isinstance(value, list) else [value]
    return [one[:200] for one in found if isinstance(one, str) and one][:_MAX_TAGS]


def _unique(tags: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(tags))


def _product(shape: Any) -> int:
    total = 1
    for size in shape:
        if type(size) is not int or not 0 <= size < 1 << 48 or total >= 1 << 62:
            raise ValueError("no shape")
        total *= size
    return total


def _object_id(model_id: str) -> str:
    return hashlib.sha256(model_id.lower().encode()).hexdigest()[:24]
