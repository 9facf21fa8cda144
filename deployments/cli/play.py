"""`rookery play`: a line is how a text begins, and the bot goes on; line after line, with a few commands between."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from deployments import show
from deployments.cli.app import USE, Exit, command
from deployments.cli.generate import (
    MAX_SEED,
    MaxTokens,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopK,
    TopP,
    draw_seed,
    generate,
    read_lines,
    request_body,
)
from deployments.cli.options import DEFAULT_URL, ModelAt, Url, console, remark
from deployments.cli.terminal import state_folder
from deployments.client import Client, ServerUnreachable
from serve.errors import RookeryError
from serve.types import MAX_CHOICES

_HELP = """\
Write how a text begins; the bot goes on. To begin one with '/', write '//'.
  /again                 the last beginning once more, with the next seed
  /n 5                   so many texts for each beginning
  /model MODEL           another bot
  /seed 3                this seed for the next text; then 4, 5, ...
  /temperature 0.8       also /top-p, /top-k, /repetition-penalty, /max-tokens; without a number: the bot's own
  /save FILE             all texts so far; as JSON lines, where its name ends in .jsonl
  /help, /quit           Ctrl-D ends, too; Ctrl-C stops the text that is being written"""
_NUMBERS: dict[str, Callable[[str], float]] = {
    **{"n": int, "max-tokens": int, "top-k": int},
    **{"temperature": float, "top-p": float, "repetition-penalty": float},
}
_COMMANDS = (*_NUMBERS, "again", "help", "model", "quit", "save", "seed")
_HISTORY_LINES = 1000
_MAX_TOKENS = 80
_DEFAULTS = {"n": 1, "max_tokens": _MAX_TOKENS}  # of this command; without a number, others are the model's own


class Misunderstood(RookeryError):
    """What was written behind '/' cannot be done."""

    code = "misunderstood"


@command(
    USE,
    """
    rookery play huggingtweets/ada
    rookery play huggingtweets/ada --temperature 0.8 --seed 7
    rookery play huggingtweets/ada < beginnings.txt
    """,
)
def play(
    model: ModelAt,
    n: Annotated[int, typer.Option("-n", min=1, max=MAX_CHOICES, help="How many texts for each beginning.")] = 1,
    seed: Seed = None,
    max_tokens: MaxTokens = _MAX_TOKENS,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: RepetitionPenalty = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Write beginnings, line by line; the bot goes on. /help lists what else it takes.

    Ends with 1 where a line that did not come from a terminal was refused.
    """
    said = {
        **{"n": n, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k},
        "repetition_penalty": repetition_penalty,
    }
    with Client(url) as client:
        game = Game(client, model, said)
        game.seed = draw_seed() if seed is None else seed
        if sys.stdin.isatty() and sys.stdout.isatty():
            return _play_with_person(game)
        if not _play_lines(game):
            raise typer.Exit(Exit.REFUSED)


@command(
    USE,
    """
    rookery run huggingtweets/ada
    rookery run huggingtweets/ada "My dream is"
    echo "My dream is" | rookery run huggingtweets/ada
    """,
)
def run(
    model: ModelAt,
    prompt: Annotated[str | None, typer.Argument(help="How the text begins.")] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Write with a bot: as `generate` where a prompt is given, here or on stdin, else as `play`."""
    if prompt is None and sys.stdin.isatty():
        play(model, url=url)
    else:
        generate(model, prompt, url=url)


@dataclass(slots=True)
class Game:
    """What holds from one line to the next: the bot, how it writes, and all that it has written."""

    client: Client
    model: str
    options: dict[str, Any]
    seed: int = 0  # of the next text
    texts: list[dict[str, Any]] = field(default_factory=list)
    is_over: bool = False
    _last: str | None = None

    def take(self, line: str) -> None:
        """Does what a line says. Raises: RookeryError, KeyboardInterrupt."""
        if line.startswith("//"):
            return self._write(line[1:])
        if not line.startswith("/"):
            return self._write(line) if line.strip() else None
        name, _, value = line[1:].strip().partition(" ")
        self._obey(name, value.strip())

    def _obey(self, name: str, value: str) -> None:
        match name:
            case "quit":
                self.is_over = True
            case "help":
                console.print(_HELP, markup=False)
            case "again" if self._last is not None:
                self._write(self._last)
            case "again":
                raise Misunderstood("There is nothing to write again yet.")
            case "model" if value:
                self.model = value
            case "seed" if value:
                self.seed = _seed(value)
            case "save" if value:
                self._save(Path(value).expanduser())
            case _ if name in _NUMBERS:
                self._set(name, value)
            case _ if name in _COMMANDS:
                console.print(f"/{name} {getattr(self, name, 'FILE')}", markup=False)
            case _:
                raise Misunderstood(f"There is no command '/{name[:40]}'; /help lists those that there are.")

    def _set(self, name: str, value: str) -> None:
        option = name.replace("-", "_")
        self.options[option] = _number(name, value, _NUMBERS[name]) if value else _DEFAULTS.get(option)

    def _write(self, prompt: str) -> None:
        self._last = prompt
        body = request_body(self.model, prompt=prompt, seed=self.seed, **self.options)
        texts: list[str] = []
        try:
            with closing(self.client.stream(body)) as pieces:
                show.show_stream(console, prompt, pieces, texts)
        finally:  # what came before Ctrl-C or an error was seen, and can be saved
            self.texts += [{"model": self.model, "prompt": prompt, "text": text, "seed": self.seed} for text in texts]
            self.seed += bool(texts)

    def _save(self, file: Path) -> None:
        if file.suffix == ".jsonl":
            content = "".join(show.json_text(text) + "\n" for text in self.texts)
        else:
            content = "\n".join(f"{text['prompt']}{text['text']}\n" for text in self.texts)
        try:
            with file.open("x", encoding="utf-8", errors="replace") as out:
                out.write(content)
        except OSError as exc:
            raise Misunderstood(f"'{file}' cannot be written: {exc.strerror}.") from exc
        remark(f"{len(self.texts)} texts are in {file}.")


def _number(name: str, value: str, parse: Callable[[str], float]) -> float:
    with suppress(ValueError, OverflowError):
        if math.isfinite(number := parse(value)):
            return number
    raise Misunderstood(f"/{name} takes a number, such as /{name} 1.")


def _seed(value: str) -> int:
    if not 0 <= (seed := int(_number("seed", value, int))) <= MAX_SEED:
        raise Misunderstood(f"/seed takes a number from 0 to {MAX_SEED}.")
    return seed


# --- Who plays --------------------------------------------------------------------------------------------


def _play_lines(game: Game) -> bool:
    """Lines of a file or another program; whether none was refused."""
    is_well = True
    for line in read_lines():
        num_texts = len(game.texts)
        try:
            game.take(line)
        except ServerUnreachable:
            raise
        except RookeryError as error:
            _tell(error)
            is_well = False
        if game.is_over:
            break
        if len(game.texts) > num_texts:
            console.print()
    return is_well


def _play_with_person(game: Game) -> None:
    remark(f"Write how a text begins; {game.model} goes on. /help lists commands, Ctrl-D ends.")
    history = _read_history()
    while not game.is_over:
        try:
            line = input(f"{game.model}> ")
        except EOFError:
            console.print()
            break
        except KeyboardInterrupt:
            console.print()
            continue
        try:
            game.take(line)
        except KeyboardInterrupt:
            continue
        except RookeryError as error:
            _tell(error)
    _write_history(history)


def _tell(error: RookeryError) -> None:
    typer.echo(f"rookery: {show.plain(str(error))}", err=True)


def _read_history() -> Path:
    """Line editing with the lines of earlier games; the file to keep those of this one in."""
    import readline

    history = state_folder() / "play_history"
    if history.exists():
        readline.read_history_file(history)
    readline.set_history_length(_HISTORY_LINES)
    readline.set_completer_delims("")
    readline.set_completer(_complete)
    readline.parse_and_bind("tab: complete")
    return history


def _write_history(history: Path) -> None:
    import readline

    readline.write_history_file(history)


def _complete(text: str, state: int) -> str | None:
    """readline's: the `state`th command that begins so."""
    found = [f"/{name} " for name in sorted(_COMMANDS) if f"/{name}".startswith(text)] if text else []
    return found[state] if state < len(found) else None
