"""Calls of the real Hub clients, each under a name. A script of its own: it knows nothing of this project.

    python -P client_calls.py MODEL_ID [NAME...]     HF_ENDPOINT, HF_HOME and HF_TOKEN as for any program

Prints one JSON object: name -> whether it worked. Why one did not is on stderr.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from huggingface_hub import HfApi, HfFileSystem, ModelCard, constants, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import http_get

WEIGHTS = "model.safetensors"
CALLS: dict[str, Callable[[HfApi, str], None]] = {}
PRIVATE: list[str] = []  # names of the calls that need a token


def call(function: Callable[[HfApi, str], None]) -> Callable[[HfApi, str], None]:
    CALLS[function.__name__] = function
    return function


def with_token(function: Callable[[HfApi, str], None]) -> Callable[[HfApi, str], None]:
    PRIVATE.append(function.__name__)
    return call(function)


def raises(kind: type[Exception], act: Callable[[], Any]) -> bool:
    try:
        act()
    except kind:
        return True
    return False


# --- Lists ------------------------------------------------------------------------------------------------


@call
def list_models_by_tag(api: HfApi, model: str) -> None:
    found = list(api.list_models(filter="huggingtweets", search=model.partition("/")[2], limit=50))
    assert model in [one.id for one in found]
    assert not list(api.list_models(filter="no-such-tag-anywhere", limit=5))


@call
def list_models_by_author(api: HfApi, model: str) -> None:
    author = model.partition("/")[0]
    found = list(
        api.list_models(author=author, filter=["text-generation", "transformers"], sort="created_at", limit=20)
    )
    assert found and all(one.author == author for one in found)
    made = [one.created_at for one in found if one.created_at is not None]
    assert made == sorted(made, reverse=True)


@call
def list_models_in_pages(api: HfApi, model: str) -> None:
    ids = [one.id for one in islice(api.list_models(full=True), 250)]
    assert len(ids) == len(set(ids)) and ids


@call
def list_models_full(api: HfApi, model: str) -> None:
    name = model.partition("/")[2]
    (found,) = [
        one for one in api.list_models(search=name, full=True, cardData=True, fetch_config=True) if one.id == model
    ]
    assert found.config is not None and found.config["model_type"] == "gpt2"
    assert found.siblings is not None and WEIGHTS in [one.rfilename for one in found.siblings]
    (found,) = [one for one in api.list_models(search=name, expand=["sha", "safetensors"]) if one.id == model]
    assert found.sha and found.safetensors is not None and found.safetensors.total > 0


@call
def get_model_tags(api: HfApi, model: str) -> None:
    assert api.get_model_tags()["pipeline_tag"][0]["id"] == "text-generation"


# --- One model --------------------------------------------------------------------------------------------


@call
def model_info(api: HfApi, model: str) -> None:
    info = api.model_info(model)
    assert info.id == model and info.sha and len(info.sha) == 40 and info.gated is False and info.disabled is False
    assert info.pipeline_tag == "text-generation" and info.library_name == "transformers"
    assert info.tags is not None and {"transformers", "safetensors", "gpt2", "text-generation"} <= set(info.tags)
    assert info.created_at is not None and info.last_modified is not None and info.card_data is not None
    assert api.model_info(model, revision=info.sha).sha == info.sha
    assert api.model_info(model, revision=info.sha[:8]).sha == info.sha
    assert api.model_info(model.upper()).id == model


@call
def model_info_with_files(api: HfApi, model: str) -> None:
    info = api.model_info(model, files_metadata=True, securityStatus=True)
    assert info.siblings is not None and info.security_repo_status is not None
    files = {one.rfilename: one for one in info.siblings}
    weights, config = files[WEIGHTS], files["config.json"]
    assert weights.lfs is not None and weights.lfs.size == weights.size and len(weights.lfs.sha256) == 64
    assert config.lfs is None and config.blob_id is not None and len(config.blob_id) == 40
    assert info.safetensors is not None and info.safetensors.total > 0


@call
def model_info_expand(api: HfApi, model: str) -> None:
    info = api.model_info(model, expand=["downloads", "likes", "cardData", "transformersInfo", "widgetData"])
    assert info.likes == 0 and info.sha is None and info.transformers_info is not None


@call
def repo_exists(api: HfApi, model: str) -> None:
    assert api.repo_exists(model) and not api.repo_exists(f"{model}-not") and not api.repo_exists("no-such-model")
    assert not api.repo_exists(model, repo_type="dataset")
    assert api.revision_exists(model, "main") and not api.revision_exists(model, "no-such-branch")


@call
def file_exists(api: HfApi, model: str) -> None:
    assert api.file_exists(model, "config.json") and not api.file_exists(model, "adapter_config.json")
    assert not api.file_exists(f"{model}-not", "config.json")


@call
def list_repo_files(api: HfApi, model: str) -> None:
    names = api.list_repo_files(model)
    assert {"config.json", WEIGHTS} <= set(names) and not any(name.startswith(".") for name in names)


@call
def list_repo_tree(api: HfApi, model: str) -> None:
    entries = list(api.list_repo_tree(model, recursive=True, expand=True))
    assert WEIGHTS in [entry.path for entry in entries] and all(entry.last_commit for entry in entries)
    assert raises(EntryNotFoundError, lambda: list(api.list_repo_tree(model, path_in_repo="no-such-folder")))


@call
def get_paths_info(api: HfApi, model: str) -> None:
    found = api.get_paths_info(model, ["config.json", WEIGHTS, "not-there"])
    assert sorted(one.path for one in found) == ["config.json", WEIGHTS]


@call
def list_repo_refs(api: HfApi, model: str) -> None:
    (main,) = api.list_repo_refs(model, include_pull_requests=True).branches
    assert main.name == "main" and main.target_commit == api.model_info(model).sha


@call
def list_repo_commits(api: HfApi, model: str) -> None:
    commits = api.list_repo_commits(model, formatted=True)
    assert commits[0].commit_id == api.model_info(model).sha and commits[0].title


@call
def get_safetensors_metadata(api: HfApi, model: str) -> None:
    metadata = api.get_safetensors_metadata(model)
    assert not metadata.sharded and sum(metadata.parameter_count.values()) > 0


@call
def auth_check(api: HfApi, model: str) -> None:
    api.auth_check(model)
    assert raises(RepositoryNotFoundError, lambda: api.auth_check(f"{model}-not"))


@call
def model_card(api: HfApi, model: str) -> None:
    card = ModelCard.load(model)
    assert card.data.tags is not None and "huggingtweets" in card.data.tags and card.text


@call
def discussions(api: HfApi, model: str) -> None:
    assert not list(api.get_repo_discussions(model))
    assert raises(HfHubHTTPError, lambda: api.get_discussion_details(model, 1))


@call
def list_models_newest_first(api: HfApi, model: str) -> None:
    """Over several pages, of which the client asks for the next one as long as there is one."""
    found = list(islice(api.list_models(sort="created_at", limit=None, full=True), 250))
    assert [one.created_at for one in found] == sorted(
        (one.created_at for one in found if one.created_at), reverse=True
    )
    assert len(found) == len({one.id for one in found})


@call
def refs_as_revisions(api: HfApi, model: str) -> None:
    sha, (main,) = api.model_info(model).sha, api.list_repo_refs(model).branches
    assert api.model_info(model, revision=main.ref).sha == sha
    assert str(sha) in api.hf_hub_download(model, "config.json", revision=main.ref)


# --- Files ------------------------------------------------------------------------------------------------


@call
def hf_hub_download(api: HfApi, model: str) -> None:
    info = api.model_info(model, files_metadata=True)
    (weights,) = [one for one in info.siblings or () if one.rfilename == WEIGHTS]
    path = Path(api.hf_hub_download(model, WEIGHTS))
    assert weights.lfs is not None and sha256(path) == weights.lfs.sha256 and str(info.sha) in str(path)
    assert Path(api.hf_hub_download(model, WEIGHTS, revision=info.sha)) == path


@call
def hf_hub_download_errors(api: HfApi, model: str) -> None:
    assert raises(EntryNotFoundError, lambda: api.hf_hub_download(model, "no-such-file"))
    assert raises(RevisionNotFoundError, lambda: api.hf_hub_download(model, WEIGHTS, revision="no-such-branch"))
    assert raises(RepositoryNotFoundError, lambda: api.hf_hub_download(f"{model}-not", WEIGHTS))
    assert raises(RepositoryNotFoundError, lambda: api.model_info("no-such-model"))
    assert raises(RevisionNotFoundError, lambda: api.model_info(model, revision="refs/pr/1"))


@call
def http_get_resumes(api: HfApi, model: str) -> None:
    """The rest of a file whose beginning is there, as after a line that broke."""
    whole = Path(api.hf_hub_download(model, WEIGHTS)).read_bytes()
    half = len(whole) // 2
    with TemporaryFile() as file:
        file.write(whole[:half])
        http_get(hf_hub_url(model, WEIGHTS), file, resume_size=half, expected_size=len(whole))
        file.seek(0)
        assert file.read() == whole


@call
def snapshot_download(api: HfApi, model: str) -> None:
    folder = Path(api.snapshot_download(model))
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == set(api.list_repo_files(model))


@call
def snapshot_download_again(api: HfApi, model: str) -> None:
    """Nothing is fetched a second time."""
    folder = Path(api.snapshot_download(model))
    before = {path: path.resolve().stat().st_ino for path in folder.rglob("*") if path.is_file()}
    assert Path(api.snapshot_download(model)) == folder
    assert before == {path: path.resolve().stat().st_ino for path in folder.rglob("*") if path.is_file()}


@call
def snapshot_download_to_folder(api: HfApi, model: str) -> None:
    with TemporaryDirectory() as folder:
        api.snapshot_download(model, local_dir=folder, allow_patterns=["*.json"])
        assert (Path(folder) / "config.json").is_file() and not (Path(folder) / WEIGHTS).exists()


@call
def hf_file_system(api: HfApi, model: str) -> None:
    fs = HfFileSystem(endpoint=os.environ["HF_ENDPOINT"])
    assert f"{model}/{WEIGHTS}" in fs.ls(model, detail=False)
    assert json.loads(fs.read_text(f"{model}/config.json"))["model_type"] == "gpt2"
    with fs.open(f"{model}/{WEIGHTS}", "rb") as file:
        file.seek(-4, os.SEEK_END)
        assert len(file.read()) == 4
    assert not fs.exists(f"{model}/no-such-file")  # type: ignore[no-untyped-call]


@call
def hf_download(api: HfApi, model: str) -> None:
    said = hf("download", model, "config.json", "--quiet")
    assert json.loads(Path(said.strip()).read_text())["model_type"] == "gpt2"


@call
def hf_models_ls(api: HfApi, model: str) -> None:
    assert model in hf("models", "ls", "--search", model.partition("/")[2], "--limit", "20", "--quiet")


@call
def hf_models_info(api: HfApi, model: str) -> None:
    assert json.loads(hf("models", "info", model, "--json"))["id"] == model


# --- transformers -----------------------------------------------------------------------------------------


@call
def auto_config(api: HfApi, model: str) -> None:
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(model).model_type == "gpt2"


@call
def auto_tokenizer(api: HfApi, model: str) -> None:
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(model)("My dream is")["input_ids"]


@call
def auto_model(api: HfApi, model: str) -> None:
    from transformers import AutoModelForCausalLM

    sha = api.model_info(model).sha
    for revision in ("main", sha):
        assert AutoModelForCausalLM.from_pretrained(model, revision=revision).config.model_type == "gpt2"


# --- With a token -----------------------------------------------------------------------------------------


@with_token
def whoami(api: HfApi, model: str) -> None:
    assert api.whoami()["name"] and api.whoami()["type"] == "user"
    assert raises(HfHubHTTPError, lambda: api.whoami(token="hf_wrong"))


@with_token
def update_repo_settings(api: HfApi, model: str) -> None:
    """A private model is there with the token alone, and then again for all."""
    stranger = HfApi(token=False)
    api.update_repo_settings(model, private=True)
    try:
        assert raises(RepositoryNotFoundError, lambda: stranger.model_info(model))
        assert raises(RepositoryNotFoundError, lambda: HfApi(token="hf_wrong").model_info(model))
        assert raises(RepositoryNotFoundError, lambda: list(stranger.list_repo_tree(model)))
        with TemporaryDirectory() as cache:
            download = stranger.hf_hub_download
            assert raises(RepositoryNotFoundError, lambda: download(model, "config.json", cache_dir=cache))
            assert Path(api.hf_hub_download(model, "config.json", cache_dir=cache)).is_file()
        assert model not in [one.id for one in stranger.list_models(search=model.partition("/")[2])]
        assert model in [one.id for one in api.list_models(search=model.partition("/")[2])]
        assert api.model_info(model).private
    finally:
        api.update_repo_settings(model, private=False)
    assert stranger.model_info(model).private is False


@with_token
def writing_is_refused(api: HfApi, model: str) -> None:
    try:
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=model)
    except HfHubHTTPError as error:
        assert error.response.status_code == 405 and "read-only" in str(error)
    else:
        raise AssertionError("something was written")


def hf(*arguments: str) -> str:
    """What the command line of huggingface_hub says."""
    command = [str(Path(sys.executable).with_name("hf")), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(model: str, *names: str) -> None:
    has_token = bool(os.environ.get("HF_TOKEN"))
    assert os.environ["HF_ENDPOINT"].rstrip("/") == constants.ENDPOINT
    passed: dict[str, bool] = {}
    for name, function in CALLS.items():
        if (names and name not in names) or (name in PRIVATE and not has_token):
            continue
        try:
            function(HfApi(), model)
            passed[name] = True
        except Exception:
            print(f"--- {name}", file=sys.stderr)
            traceback.print_exc()
            passed[name] = False
    print(json.dumps(passed))


if __name__ == "__main__":
    main(*sys.argv[1:])
