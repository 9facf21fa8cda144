"""Files, fine-tuning jobs and the one-call way, by the unmodified openai client."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.api.conftest import Server, World


@pytest.fixture
async def ai(world: World) -> AsyncIterator[AsyncOpenAI]:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=world.app))
    async with AsyncOpenAI(base_url="http://rookery/v1", api_key="any", http_client=http, max_retries=0) as client:
        yield client


async def upload(ai: AsyncOpenAI, content: bytes = b"tweets", name: str = "ada.zip") -> str:
    return (await ai.files.create(file=(name, content), purpose="fine-tune")).id


async def test_a_file_is_uploaded_listed_read_and_deleted(ai: AsyncOpenAI, world: World) -> None:
    content = bytes(range(256)) * 2000
    created = await ai.files.create(file=("ada.zip", content), purpose="fine-tune")
    assert (created.filename, created.bytes, created.purpose) == ("ada.zip", len(content), "fine-tune")
    assert created.object == "file" and created.status == "processed"
    assert [file.id async for file in ai.files.list(purpose="fine-tune")] == [created.id]
    assert await ai.files.retrieve(created.id) == created
    assert (await ai.files.content(created.id)).content == content
    assert (await ai.files.delete(created.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await ai.files.retrieve(created.id)
    assert not list(world.upload_dir.iterdir())


async def test_files_are_listed_in_pages_either_way_round(ai: AsyncOpenAI) -> None:
    ids = [await upload(ai) for _ in range(5)]
    assert [file.id async for file in ai.files.list(limit=2)] == ids[::-1]
    assert [file.id async for file in ai.files.list(limit=2, order="asc")] == ids


@pytest.mark.parametrize(
    ("given", "kept"),
    [("../../etc/passwd", "passwd"), ("C:\\tweets\\a.zip", "a.zip"), ('q"\r\n.zip', None), ("日本.zip", "日本.zip")],
)
async def test_a_filename_is_for_display_only(
    ai: AsyncOpenAI, client: httpx.AsyncClient, given: str, kept: str | None
) -> None:
    file = await ai.files.create(file=(given, b"x"), purpose="fine-tune")
    assert "/" not in file.filename and "\n" not in file.filename
    assert kept is None or file.filename == kept
    answer = await client.get(f"/v1/files/{file.id}/content")
    assert answer.headers["content-disposition"].startswith("attachment")


async def test_a_file_that_is_too_large_empty_or_for_another_purpose_is_refused(ai: AsyncOpenAI, world: World) -> None:
    with pytest.raises(openai.APIStatusError) as large:
        await upload(ai, b"x" * (2 << 20))
    assert large.value.status_code == 413
    with pytest.raises(openai.BadRequestError):
        await upload(ai, b"")
    with pytest.raises(openai.BadRequestError) as purpose:
        await ai.files.create(file=("a", b"x"), purpose="vision")
    assert purpose.value.param == "purpose"
    assert not list(world.upload_dir.iterdir()) and not world.files.records


@pytest.mark.parametrize("path", ["%00", "a%00b", "%00/content", "é", "x" * 129, "?purpose=%00"])
async def test_what_no_database_keeps_asks_none(
    client: httpx.AsyncClient, world: World, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    for name in ("get_file", "delete_file", "list_files"):
        monkeypatch.setattr(world.files, name, None)
    route = "/v1/files" + ("" if path.startswith("?") else "/") + path
    assert (await client.get(route)).status_code == 400
    if "?" not in path and "content" not in path:
        assert (await client.delete(route)).status_code == 400


async def test_a_large_body_without_a_length_is_cut_off_at_the_limit(client: httpx.AsyncClient, world: World) -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(100_000):
            yield b"x" * 65536

    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = await client.post("/v1/files", content=endless(), headers=headers)
    assert answer.status_code == 413 and not list(world.upload_dir.iterdir())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"--b\r\n",
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhalf',
        b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nno file\r\n--b--\r\n',
        b"--b\r\n\r\nno headers\r\n--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n' + b"x" * 70_000 + b"\r\n--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n\r\n' * 100 + b"--b--\r\n",
    ],
)
async def test_b4_a_broken_form_is_refused_and_leaves_nothing(
    client: httpx.AsyncClient, world: World, body: bytes
) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = await client.post("/v1/files", content=body, headers=headers)
    assert answer.status_code == 400 and len(answer.content) < 4096
    assert not list(world.upload_dir.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
async def test_a_disk_that_takes_no_more_is_told_and_everything_is_closed(
    client: httpx.AsyncClient, world: World, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    opened: list[io.BufferedWriter] = []

    class Failing(io.FileIO):
        def write(self, data: object) -> int:
            raise OSError(number, os.strerror(number))

    def open_failing(path: Path, mode: str) -> io.BufferedWriter:
        assert mode == "xb"
        opened.append(io.BufferedWriter(Failing(path, "x")))
        return opened[-1]

    monkeypatch.setattr(Path, "open", open_failing)
    files = [("archive", ("a.zip", b"a")), ("archive", ("b.zip", b"b"))]
    answer = await client.post("/v1/bots", files=files)

    is_full = number != errno.EIO
    assert answer.status_code == (507 if is_full else 503) and int(answer.headers["retry-after"]) > 0
    assert answer.headers.get("x-should-retry") == ("false" if is_full else None)
    assert answer.json()["error"]["code"] == ("disk_full" if is_full else "store_unavailable")
    assert len(opened) == 2 and all(file.closed and file.raw.closed for file in opened)
    assert not list(world.upload_dir.iterdir())


@pytest.mark.parametrize("handle", ["", "a b", "a\nb", "x" * 257])
async def test_a_handle_that_is_none_is_refused_in_a_sentence(client: httpx.AsyncClient, handle: str) -> None:
    answer = await client.post("/v1/bots", files=[("archive", ("a.zip", b"a"))], data={"handle": [handle]})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "handle")
    assert error["message"] == "'handle': Input should be names of accounts, of 1 to 256 characters without spaces."


@pytest.mark.parametrize("kind", ["", "multipart/form-data", "multipart/form-data; boundary=", "text/plain"])
async def test_b4_a_form_without_a_boundary_is_refused(client: httpx.AsyncClient, kind: str) -> None:
    answer = await client.post("/v1/files", content=b"x", headers={"content-type": kind})
    assert answer.status_code in (400, 415)


async def test_a_job_is_created_listed_followed_and_cancelled(ai: AsyncOpenAI) -> None:
    file_id = await upload(ai)
    job = await ai.fine_tuning.jobs.create(
        model="gpt2",
        training_file=file_id,
        suffix="ada",
        seed=7,
        hyperparameters={"n_epochs": 2, "batch_size": "auto"},
        metadata={"team": "a"},
    )
    assert job.object == "fine_tuning.job" and job.status == "queued" and job.model == "gpt2"
    assert job.training_file == file_id and job.validation_file is None and job.result_files == []
    assert job.hyperparameters.to_dict() == {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert job.method and job.method.type == "supervised"
    assert job.error is None and job.integrations is None and job.metadata == {"team": "a"} and job.seed == 7
    assert (await ai.fine_tuning.jobs.retrieve(job.id)) == job
    events = [event async for event in ai.fine_tuning.jobs.list_events(job.id, limit=2)]
    assert [event.message for event in events] == ["Step 2", "Step 1", "Step 0"]
    assert events[0].object == "fine_tuning.job.event" and events[0].data == {"step": 2}
    assert (await ai.fine_tuning.jobs.cancel(job.id)).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        await ai.fine_tuning.jobs.cancel(job.id)


async def test_the_new_place_of_hyperparameters_counts_first(ai: AsyncOpenAI, world: World) -> None:
    await ai.fine_tuning.jobs.create(
        model="gpt2",
        training_file=await upload(ai),
        hyperparameters={"n_epochs": 1},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
    )
    assert world.jobs.jobs["ftjob-0"].request.hyperparameters.n_epochs == 3


async def test_jobs_are_filtered_by_metadata_and_paged(ai: AsyncOpenAI) -> None:
    file_id = await upload(ai)
    for team in "abaaa":
        await ai.fine_tuning.jobs.create(model="gpt2", training_file=file_id, metadata={"team": team})
    assert len([job async for job in ai.fine_tuning.jobs.list(limit=2, metadata={"team": "a"})]) == 4
    assert len([job async for job in ai.fine_tuning.jobs.list()]) == 5


async def test_a_handle_comes_from_the_body_or_the_metadata(ai: AsyncOpenAI, world: World) -> None:
    file_id = await upload(ai)
    ours: list[dict[str, Any]] = [
        {"metadata": {"handle": "@ada"}},
        {"extra_body": {"handle": "bob"}},
        {},
    ]
    for extra in ours:
        await ai.fine_tuning.jobs.create(model="gpt2", training_file=file_id, **extra)
    assert [job.request.files[0].handle for job in world.jobs.jobs.values()] == ["ada", "bob", None]


async def test_a_cyborg_learns_from_several_files(client: httpx.AsyncClient, ai: AsyncOpenAI) -> None:
    ids = [await upload(ai), await upload(ai)]
    files = [{"file_id": ids[0], "handle": "@ada"}, {"file_id": ids[1]}]
    job = (await client.post("/v1/fine_tuning/jobs", json={"model": "gpt2", "training_files": files})).json()
    assert job["training_file"] == ids[0]
    assert job["training_files"] == [{"file_id": ids[0], "handle": "ada"}, {"file_id": ids[1], "handle": None}]


async def test_a_wrong_field_of_a_job_is_named(client: httpx.AsyncClient, ai: AsyncOpenAI) -> None:
    rows: list[tuple[dict[str, Any], str | None]] = [
        ({"training_file": None}, "training_file"),
        ({"training_file": "file-99"}, None),
        ({"training_files": []}, "training_files"),
        ({"training_files": [{"file_id": "a"}]}, "training_files"),
        ({"validation_file": "file-99"}, None),
        ({"validation_file": "a b"}, "validation_file"),
        ({"suffix": "../etc"}, "suffix"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"seed": "7"}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs"),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"integrations": [{"type": "mlflow"}]}, "integrations.0.type"),
        ({"integrations": {"type": "wandb"}}, "integrations"),
        ({"integrations": [{"type": "wandb"}, {"type": "wandb"}]}, "integrations"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": ""}}]}, "integrations.0.wandb.project"),
        ({"integrations": [{"type": "wandb", "wandb": {"tags": ["\n"]}}]}, "integrations.0.wandb.tags.0"),
        ({"priority": "urgent"}, "priority"),
        ({"priority": 1}, "priority"),
        ({"metadata": {"secret-key": 1}}, "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"metadata": {"a": "\0"}}, "metadata"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 0}}}},
            "method.supervised.hyperparameters.batch_size",
        ),
        ({"handle": "a\nb"}, "handle"),
    ]
    file_id = await upload(ai)
    for wrong, param in rows:
        answer = await client.post("/v1/fine_tuning/jobs", json={"model": "gpt2", "training_file": file_id, **wrong})
        assert answer.status_code in (400, 404) and answer.json()["error"]["param"] == param, wrong
        assert "secret-key" not in answer.text


async def test_one_call_makes_files_and_a_job(client: httpx.AsyncClient, world: World) -> None:
    answer = await client.post(
        "/v1/bots",
        files=[("archive", ("a.zip", b"a")), ("archive", ("b.zip", b"b"))],
        data={"handle": ["@ada"], "seed": "3", "n_epochs": "2"},
    )
    assert answer.status_code == 201
    request = world.jobs.jobs[answer.json()["id"]].request
    assert request.base_model == "fledgling" and request.seed == 3 and request.hyperparameters.n_epochs == 2
    assert [(file.file_id, file.handle) for file in request.files] == [("file-0", "ada"), ("file-1", None)]
    assert {record.purpose for record in world.files.records.values()} == {"bot"}  # they go with their job


async def test_a_refused_bot_leaves_no_file_behind(client: httpx.AsyncClient, world: World) -> None:
    rows: list[tuple[list[Any], dict[str, Any]]] = [
        ([], {"handle": ["ada"]}),
        ([("archive", ("a.zip", b"a"))], {"handle": ["short"]}),
        ([("archive", ("a.zip", b"a"))], {"handle": ["a", "b"]}),
        ([("archive", ("a.zip", b"a"))], {"seed": "many"}),
        ([("archive", ("a.zip", b"a"))], {"n_epochs": "1000"}),
        ([("archive", ("a.zip", b"a"))], {"batch_size": "half"}),
        ([("archive", ("a.zip", b"a"))], {"priority": "urgent"}),
        ([("archive", ("a.zip", b"a"))], {"suffix": "../etc"}),
        ([("archive", ("a.zip", b"a"))], {"integrations": "not json"}),
        ([("archive", ("a.zip", b"a"))], {"integrations": '[{"type": "mlflow"}]'}),
        ([("archive", ("a.zip", b"a"))], {"metadata[k]": "x" * 513}),
        ([("archive", ("a.zip", b"a")), ("validation", ("v.txt", b""))], {}),
        ([("archive", ("a.zip", b"a")), ("validation", ("v", b"v")), ("validation", ("w", b"w"))], {}),
        ([("archive", ("a.zip", b"a"))], {"base_model": "../x"}),
        ([("archive", ("a.zip", b"a")), ("archive", ("b.zip", b""))], {}),
    ]
    for files, data in rows:
        answer = await client.post("/v1/bots", files=files or [("other", ("a", b"x"))], data=data)
        assert answer.status_code in (400, 404) and len(answer.content) < 4096, data
        assert not world.files.records and not world.jobs.jobs and not list(world.upload_dir.iterdir()), data


def test_an_upload_and_a_job_work_over_a_real_socket(server: Server) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as ai:
        file = ai.files.create(file=("ada.zip", b"x" * 500_000), purpose="fine-tune")
        assert ai.files.content(file.id).content == b"x" * 500_000
        job = ai.fine_tuning.jobs.create(model="gpt2", training_file=file.id)
        assert ai.fine_tuning.jobs.retrieve(job.id).training_file == file.id
        with pytest.raises(openai.APIStatusError) as large:
            ai.files.create(file=("big.zip", b"x" * (4 << 20)), purpose="fine-tune")
        assert large.value.status_code == 413
