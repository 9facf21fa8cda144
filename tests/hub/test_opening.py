"""The Hub that settings name, and the one of a training process, which is told of them."""

from __future__ import annotations

from pathlib import Path

from deployments.parts import run_options
from serve.hub.opening import open_hub
from serve.settings import Settings
from serve.store.revisions import Store
from serve.training.jobs.options import RunOptions


def test_a_training_process_leaves_models_on_the_disk_for_as_long_as_a_generator_does(tmp_path: Path) -> None:
    settings, store = Settings(data=tmp_path, lease_timeout_s=33.0), Store(tmp_path, embedded={})
    told = RunOptions.from_json(run_options(settings).to_json())
    assert [open_hub(one, store)._budget._in_use_s for one in (settings, told)] == [93.0, 93.0]
