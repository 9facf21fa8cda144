"""The real Hub clients, unmodified, in processes whose environment knows nothing of this project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

_CALLS = Path(__file__).with_name("client_calls.py")
_TIMEOUT_S = 300

_THREE_LINES = """\
from transformers import pipeline
generator = pipeline('text-generation', model='{model}')
generator("My dream is", num_return_sequences=5)
"""


def check_clients(
    endpoint: str, model_id: str, *, token: str | None = None, names: tuple[str, ...] = ()
) -> dict[str, bool]:
    """Which calls of huggingface_hub, its command line and transformers work against `endpoint`, by their names.

    `names`: those alone. `token`: one of the service's keys; without it, the calls that need one are left out. With it
    the model is private for a moment. What a failed call said is on stderr.
    """
    with TemporaryDirectory() as home:
        arguments = ["-P", str(_CALLS), model_id, *names]
        done = run_apart(arguments, endpoint, Path(home), token=token)
    sys.stderr.write(done.stderr if done.returncode or "---" in done.stderr else "")
    passed: dict[str, bool] = json.loads(done.stdout.splitlines()[-1])
    return passed


def pipeline_word_for_word(endpoint: str, model_id: str, *, token: str | None = None) -> bool:
    """Whether the three lines of a huggingtweets card work, and write five texts that begin with the prompt."""
    lines = _THREE_LINES.format(model=model_id)
    shown = f"import ast\ntree = ast.parse({lines!r})\n"
    # As at the prompt of a Python shell, which shows what the last line gives.
    shown += "names = {}\nexec(compile(ast.Module(tree.body[:-1], []), 'lines', 'exec'), names)\n"
    shown += "texts = eval(compile(ast.Expression(tree.body[-1].value), 'line', 'eval'), names)\n"
    shown += "import json\nprint(json.dumps([text['generated_text'] for text in texts]))\n"
    with TemporaryDirectory() as home:
        done = run_apart(["-c", shown], endpoint, Path(home), token=token)
    if done.returncode:
        sys.stderr.write(done.stderr)
        return False
    texts = json.loads(done.stdout.splitlines()[-1])
    return len(texts) == 5 and all(text.startswith("My dream is") for text in texts)


def run_apart(
    arguments: list[str], endpoint: str, home: Path, *, token: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Python in an empty folder, with the Hub's variables and no others."""
    environment = {
        "PATH": os.defpath,
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        **({"HF_TOKEN": token} if token else {}),
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=_TIMEOUT_S)
