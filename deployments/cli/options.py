"""What several verbs share: their options, where they print, and the settings of this machine.

stdout is data, and `console` writes to it; whatever else there is to say goes to `remarks`, which is stderr.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from deployments import running
from deployments.cli.terminal import is_tty
from deployments.cli.words import complete_jobs, complete_models
from deployments.show import json_text, plain
from serve.settings import Settings

# Where no terminal tells a width, lines are not folded: programs read them.
console = Console(width=None if is_tty(sys.stdout) else 240, highlight=False)
remarks = Console(width=None if is_tty(sys.stderr) else 240, highlight=False, stderr=True)

DEFAULT_URL = running.default_url()

Url = Annotated[str, typer.Option("--url", envvar="ROOKERY_URL", help="The server to talk to.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Limit = Annotated[int, typer.Option("--limit", min=1, max=1000, help="How many to list.")]
Data = Annotated[Path | None, typer.Option("--data", help="Where models, uploads and jobs are kept.")]
Archives = Annotated[
    list[Path],
    typer.Argument(exists=True, dir_okay=False, help="X archives (zip), or exports of posts in other formats."),
]
Handles = Annotated[list[str] | None, typer.Option("--handle", help="Whose archive it is; once for each, in order.")]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="For example huggingtweets/ada.", autocompletion=complete_models)
]
ModelAt = Annotated[
    str,
    typer.Argument(metavar="MODEL[@REVISION]", help="For example huggingtweets/ada.", autocompletion=complete_models),
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="For example ftjob-1234.", autocompletion=complete_jobs)]


def settings_of(data: Path | None) -> Settings:
    """Those of the environment, with another data folder if there is one. Raises: BadSetting."""
    settings = Settings.from_env()
    return settings if data is None else replace(settings, data=data)


def print_json(value: Any) -> None:
    """A document on stdout."""
    typer.echo(json_text(value, indent=2))


def tell(sentence: str) -> None:
    """A sentence on stdout that is the result of the command."""
    console.print(plain(sentence), markup=False, soft_wrap=True)


def remark(sentence: str) -> None:
    """A sentence on stderr, which --quiet leaves out."""
    remarks.print(plain(sentence), markup=False, soft_wrap=True)
