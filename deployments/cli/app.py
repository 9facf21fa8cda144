"""The command itself: how a function becomes a verb of it, how it ends, and what it does with errors.

Knows no verb.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from functools import wraps
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.markup import escape

from deployments import show
from deployments.cli.options import remarks
from deployments.cli.terminal import give_up_stdout, prepare_streams
from deployments.client import Refused, ServerUnreachable
from serve.errors import (
    DeadlineExceeded,
    ModelGated,
    ModelNotFound,
    NotFound,
    Overloaded,
    RookeryError,
    StoreUnavailable,
)
from serve.settings import BadSetting

COMPLETE = "_ROOKERY_COMPLETE"  # Typer's name for the variable by which a shell asks for completions

_ENDS = """\
Exit codes:
  0  done
  1  refused, or failed
  2  wrong usage
  3  no such model or job
  4  a key is needed, or is wrong
  5  the server or the Hub cannot be reached, or has no room now
130  interrupted

Data goes to stdout, progress and remarks to stderr. Colours only in a terminal; NO_COLOR=1 switches them off.

Examples:
$ rookery up --detach
$ rookery train twitter-archive.zip --handle ada
$ rookery generate huggingtweets/ada "My dream is" -n 5
$ source <(rookery completion bash)
"""

app = typer.Typer(
    name="rookery",
    epilog=_ENDS,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# The panels of `rookery --help`.
SERVICE, MAKE, USE, LOOK, HUB = "The service", "Make bots", "Use bots", "Look", "The Hub"

_Verb = TypeVar("_Verb", bound=Callable[..., Any])
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing but data and errors.")]


class Exit(IntEnum):
    """How the command ends."""

    DONE = 0
    REFUSED = 1
    USAGE = 2
    NOT_FOUND = 3
    KEY = 4
    UNAVAILABLE = 5
    INTERRUPTED = 130


_BY_STATUS = dict.fromkeys((401, 403), Exit.KEY) | dict.fromkeys((429, 502, 503, 504, 507), Exit.UNAVAILABLE)
_BY_STATUS[404] = Exit.NOT_FOUND


def command(panel: str, examples: str, *, name: str | None = None, of: typer.Typer = app) -> Callable[[_Verb], _Verb]:
    """Makes a function a verb, which takes --quiet as well. `examples` are shown below its help, as one types them."""

    def register(verb: _Verb) -> _Verb:
        of.command(name, rich_help_panel=panel, epilog=_as_epilog(examples))(_with_quiet(verb))
        return verb

    return register


def group(panel: str, name: str, examples: str, *, about: str, is_verb: bool = False) -> typer.Typer:
    """What verbs are put into by `command`. `about` is its help; `is_verb`: it has a callback that is one, too."""
    made = typer.Typer(help=about, epilog=_as_epilog(examples), no_args_is_help=not is_verb)
    app.add_typer(made, name=name, rich_help_panel=panel)
    return made


def _as_epilog(examples: str) -> str:
    return "\n".join(["Examples:", *(f"$ {escape(line.strip())}" for line in examples.strip().splitlines())])


def _with_quiet(verb: Callable[..., Any]) -> Callable[..., Any]:
    """`verb` with one option more, so that -q may stand behind it, too."""

    @wraps(verb)
    def run(*, quiet: bool, **options: Any) -> Any:
        remarks.quiet = remarks.quiet or quiet
        return verb(**options)

    signature = inspect.signature(verb, eval_str=True)
    option = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_Quiet)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    return run


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"rookery {version('rookery')}")
        raise typer.Exit


@app.callback()
def _rookery(
    quiet: _Quiet = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Tell the version and exit.")
    ] = False,
) -> None:
    """Hosts thousands of personal tweet models, and makes new ones in minutes."""
    remarks.quiet = quiet


def exit_of(error: Exception) -> Exit:
    """How the command ends after `error`."""
    match error:
        case Refused():
            return _BY_STATUS.get(error.status, Exit.REFUSED)
        case ModelNotFound() | NotFound():
            return Exit.NOT_FOUND
        case ModelGated():
            return Exit.KEY
        case ServerUnreachable() | StoreUnavailable() | Overloaded() | DeadlineExceeded():
            return Exit.UNAVAILABLE
    return Exit.REFUSED


def main() -> None:
    """Runs the command of this process's arguments, or completes them where a shell asks for that."""
    prepare_streams()
    if COMPLETE in os.environ:
        from typer.completion import completion_init  # type: ignore[attr-defined]

        completion_init()
    for number, word in enumerate(sys.argv[1:], 1):
        if not _is_unicode(word):
            _end(Exit.USAGE, f"Argument {number} is not UTF-8 text.")
    try:
        app(prog_name="rookery")
    except (RookeryError, BadSetting) as error:
        _end(exit_of(error), str(error))
    except OSError as error:
        if error.filename is None:
            give_up_stdout()
        _end(Exit.REFUSED, f"{error.filename or 'The output cannot be written'}: {error.strerror or error}.")


def _end(code: Exit, sentence: str) -> NoReturn:
    with suppress(OSError):  # stderr may be full as well
        typer.echo(f"rookery: {show.plain(sentence)}", err=True)
    sys.exit(code)


def _is_unicode(word: str) -> bool:
    """Python keeps bytes that are no UTF-8 as letters that nothing can send."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True
