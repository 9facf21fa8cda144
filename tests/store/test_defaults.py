"""A model's own sampling settings, from either of the two places they have lived in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serve.store.defaults import GenerationDefaults, generation_defaults

# As in the first huggingtweets models.
HUGGINGTWEETS = {
    "do_sample": True,
    "max_length": 160,
    "min_length": 10,
    "prefix": "<|endoftext|>",
    "temperature": 1.0,
    "top_p": 0.95,
}


def write(folder: Path, task: Any = None, generation: Any = None) -> GenerationDefaults:
    params = {} if task is None else {"task_specific_params": {"text-generation": task}}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **params}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return generation_defaults(folder)


def test_old_models_keep_their_settings_in_the_config(tmp_path: Path) -> None:
    defaults = write(tmp_path, HUGGINGTWEETS)
    assert defaults.sampling == {"temperature": 1.0, "top_p": 0.95}
    assert (defaults.max_length, defaults.min_length, defaults.prefix) == (160, 10, "<|endoftext|>")


def test_generation_config_comes_before_the_config(tmp_path: Path) -> None:
    generation = {"top_k": 20, "max_new_tokens": 30, "min_new_tokens": 2, "typical_p": 0.9, "stop_strings": "\n"}
    defaults = write(tmp_path, HUGGINGTWEETS, generation | {"repetition_penalty": 1.2})
    expected = {"top_k": 20, "max_new_tokens": 30, "min_new_tokens": 2, "typical_p": 0.9, "stop": ("\n",)}
    assert defaults.sampling == expected | {"repetition_penalty": 1.2}
    assert (defaults.max_length, defaults.min_length) == (None, 0)


def test_generation_config_that_says_nothing_of_sampling_leaves_it_to_the_config(tmp_path: Path) -> None:
    defaults = write(tmp_path, HUGGINGTWEETS, {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 1})
    assert defaults.sampling == {"temperature": 1.0, "top_p": 0.95}


def test_no_sampling_is_temperature_zero(tmp_path: Path) -> None:
    assert write(tmp_path, generation={"do_sample": False, "temperature": 0.7}).sampling == {"temperature": 0.0}


def test_model_without_settings_has_none(tmp_path: Path) -> None:
    assert generation_defaults(tmp_path) == GenerationDefaults()
    assert write(tmp_path) == GenerationDefaults()


@pytest.mark.parametrize(
    "said",
    [
        {"temperature": "hot", "top_p": 2, "top_k": -1, "max_length": -5, "stop_strings": [3]},
        {"temperature": True, "top_p": 0, "top_k": 1.5, "max_new_tokens": 0, "min_p": float("nan")},
        {"temperature": None, "typical_p": [1], "repetition_penalty": 0, "max_length": 10**12, "prefix": 3},
    ],
)
def test_settings_without_sense_are_left_out(tmp_path: Path, said: dict[str, Any]) -> None:
    assert write(tmp_path, said) == GenerationDefaults()
    assert write(tmp_path, generation=said) == GenerationDefaults()


@pytest.mark.parametrize(
    "config", ["[]", "{", '{"task_specific_params": 3}', '{"task_specific_params": {"text-generation": 1}}']
)
def test_broken_files_have_no_settings(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "generation_config.json").write_text(config)
    assert generation_defaults(tmp_path) == GenerationDefaults()
