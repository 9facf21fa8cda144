"""The parts of the peers that need no server: vocabulary, commands, presets, plans, the cache of models."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from loadtest import tokenizer
from loadtest.peers import command, fleet, gguf, lru_server, ours, router
from loadtest.peers.completions import Wanted, ending, event, whole
from loadtest.peers.fleet import Fleet
from loadtest.peers.peer import cores
from loadtest.traffic.schedule import schedule


def test_every_token_has_a_text_of_its_own_and_the_last_is_the_end() -> None:
    tokens = tokenizer.vocabulary()
    assert len(tokens) == len(set(tokens)) == tokenizer.NUM_TOKENS
    assert tokens[50_256] == tokenizer.END_OF_TEXT
    assert sum(token.startswith(tokenizer.SPACE) for token in tokens) == pytest.approx(
        tokenizer.NUM_TOKENS / 2, rel=0.01
    )
    made = {a + b for a, b in tokenizer.merges()}
    assert all(part in made or len(part) == 1 for pair in tokenizer.merges() for part in pair)


def test_gguf_holds_the_folder_s_own_tokens_and_merges(tmp_path: Path) -> None:
    tokenizer.write_tokenizer(tmp_path)
    tokens, merges = gguf._vocabulary(tmp_path, tokenizer.NUM_TOKENS)
    assert (tokens, merges) == (tokenizer.vocabulary(), [f"{a} {b}" for a, b in tokenizer.merges()])
    stand_in, none = gguf._vocabulary(tmp_path, tokenizer.NUM_TOKENS + 1)
    assert (len(stand_in), stand_in[-1], len(none)) == (tokenizer.NUM_TOKENS + 1, tokenizer.END_OF_TEXT, 1)


def test_linked_models_share_the_files_of_the_few_that_differ(tmp_path: Path) -> None:
    for name in ("m0", "m1"):
        (tmp_path / "kept" / name).mkdir(parents=True)
        (tmp_path / "kept" / name / "model.safetensors").write_text(name)
        (tmp_path / "kept" / f"{name}.gguf").write_text(name)
    linked = fleet.linked(tmp_path / "kept", tmp_path / "data", 5)
    assert linked.ids == tuple(f"bench/m{number}" for number in range(5))
    assert [linked.gguf(model_id).read_text() for model_id in linked.ids] == ["m0", "m1", "m0", "m1", "m0"]
    assert (linked.folder("bench/m4") / "model.safetensors").samefile(tmp_path / "kept" / "m0" / "model.safetensors")
    assert linked.first(2).ids == ("bench/m0", "bench/m1")
    assert linked.model_bytes == 2


def test_the_router_gets_a_section_a_model_and_the_limit_of_models(tmp_path: Path) -> None:
    models = Fleet(tmp_path, ("bench/m0", "bench/m1"))
    assert f"[bench/m1]\nmodel = {tmp_path}/gguf/m1.gguf\n" in router.preset_of(models)
    asked = router.command(Path("llama-server"), tmp_path / "models.ini", 8000, 8, 1)
    assert asked[asked.index("--models-max") + 1] == "8"


def test_llama_cpp_has_all_cores_for_a_model_unless_many_models_want_them_at_once(tmp_path: Path) -> None:
    one, many = Fleet(tmp_path, ("bench/m0",)), Fleet(tmp_path, ("bench/m0", "bench/m1"))
    assert router.threads_for(one) == cores()
    assert router.threads_for(many) == 1


def test_loads_of_rookery_are_counted_over_all_tiers_without_failures() -> None:
    metrics = (
        'rookery_model_loads_total{outcome="ok",tier="host"} 3.0\n'
        'rookery_model_loads_total{outcome="ok",tier="disk"} 2.0\n'
        'rookery_model_loads_total{outcome="failed",tier="none"} 7.0\n'
    )
    assert ours.count_loads(metrics) == 5


def test_all_servers_get_the_same_schedule_and_each_round_another() -> None:
    options = command.Options(counts=(8,), rate=20.0)
    ids = [f"bench/m{number}" for number in range(8)]
    first, again, other = (list(schedule(command.light_plan(options, 8, seed, 5.0), ids)) for seed in (1, 1, 2))
    assert first == again
    assert [call.at_s for call in first] != [call.at_s for call in other]
    assert all(8 <= call.num_tokens <= 24 for call in first)


def test_models_that_may_be_in_memory_are_asked_once_each_before_a_run() -> None:
    options = command.Options(memory=4)
    calls = list(schedule(command.warm_plan(options, 32), [f"m{number}" for number in range(32)]))
    assert [call.model for call in calls] == ["m0", "m1", "m2", "m3"]


def test_a_request_says_what_generate_is_to_do_and_no_more() -> None:
    wanted = Wanted.of({"model": "bench/m0", "prompt": "My", "max_tokens": 4, "top_p": 0.95, "n": 1, "stream": True})
    assert wanted.is_streaming
    assert wanted.sampling == {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}
    assert Wanted("m", "p", temperature=0.0).sampling == {"do_sample": False}


def test_a_stream_ends_with_its_reason_its_cost_and_the_mark() -> None:
    wanted = Wanted("bench/m0", "My", max_tokens=4)
    assert json.loads(event(wanted, " dream").removeprefix("data: "))["choices"][0]["text"] == " dream"
    last, cost, mark = ending(wanted, 2, 4).split("\n\n")[:3]
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert json.loads(cost.removeprefix("data: "))["usage"]["completion_tokens"] == 4
    assert mark == "data: [DONE]"
    assert whole(wanted, "text", 2, 3)["choices"][0]["finish_reason"] == "stop"


async def test_the_cache_drops_the_idle_model_that_was_used_longest_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lru_server, "load", lambda folder: lru_server.Loaded(SimpleNamespace(), None))
    cache = lru_server.Cache(Path(), keep=2)
    for model_id in ("a", "b", "a", "c", "a"):
        async with cache.borrow(model_id):
            pass
    assert cache.num_loads == 3  # b went for c
    async with cache.borrow("b"):
        pass
    assert cache.num_loads == 4


async def test_who_needs_room_waits_for_a_model_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lru_server, "load", lambda folder: lru_server.Loaded(SimpleNamespace(), None))
    cache = lru_server.Cache(Path(), keep=1)
    order: list[str] = []

    async def use_b() -> None:
        async with cache.borrow("b"):
            order.append("b")

    async with cache.borrow("a"):
        waiting = asyncio.create_task(use_b())
        await asyncio.sleep(0)
        order.append("a")
    await waiting
    assert order == ["a", "b"]
