"""`rookery generate`: texts by a bot, from one prompt or from many on stdin, for people and for programs."""

from __future__ import annotations

import math
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import Queue
from threading import Thread
from typing import Annotated, Any, TypeVar

import typer

from deployments import show
from deployments.cli.app import USE, command
from deployments.cli.options import DEFAULT_URL, AsJson, ModelAt, Url, console, print_json, remark
from deployments.client import Client, Json
from serve.types import MAX_CHOICES, PREVIEW_PROMPT

T = TypeVar("T")
R = TypeVar("R")

MAX_SEED = 2**63 - 1
_SEED_BITS = 32  # of one that is drawn: a person may want to write it down
_AT_ONCE = 4  # requests for prompts of stdin
_READ_BYTES = 65_536


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no number that anything could be multiplied by.")
    return value


Seed = Annotated[int | None, typer.Option(min=0, max=MAX_SEED, help="The same seed gives the same texts.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="The longest text, in tokens.")]
Temperature = Annotated[
    float | None, typer.Option(min=0.0, max=2.0, callback=_finite, help="0: always the likeliest token.")
]
TopP = Annotated[
    float | None, typer.Option("--top-p", min=0.0, max=1.0, callback=_finite, help="Only the likeliest, of this share.")
]
TopK = Annotated[int | None, typer.Option("--top-k", min=0, help="Only so many of the likeliest; 0: all.")]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(min=0.0, max=10.0, callback=_finite, help="Over 1: words that were there are less likely."),
]


@command(
    USE,
    """
    rookery generate huggingtweets/ada "My dream is" -n 5
    rookery generate huggingtweets/ada "Today" --seed 7 --temperature 0.7
    echo "I think that" | rookery generate huggingtweets/ada
    rookery generate huggingtweets/ada --jsonl < prompts.txt > texts.jsonl
    """,
)
def generate(
    model: ModelAt,
    prompt: Annotated[
        str | None, typer.Argument(help=f'How the text begins: "{PREVIEW_PROMPT}", or stdin where that is no terminal.')
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, max=MAX_CHOICES, help="How many texts.")] = 1,
    seed: Seed = None,
    max_tokens: MaxTokens = 80,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: RepetitionPenalty = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends before it is written; up to 4 of these.")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Show texts as they are written; the default for one in a terminal."),
    ] = None,
    as_jsonl: Annotated[
        bool, typer.Option("--jsonl", help="Print JSON, a text a line; on stdin each line is a prompt.")
    ] = False,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Write texts with a bot.

    A PROMPT of "-" is stdin. Texts that are not JSON have an empty line between. Without --seed one is drawn and told,
    so that the texts can be had again; with --jsonl the second prompt has the next seed, and so on.
    """
    if as_json and as_jsonl:
        raise typer.BadParameter("give one of --json and --jsonl.", param_hint="--json")
    if stream and (as_json or as_jsonl):
        raise typer.BadParameter("JSON is printed whole.", param_hint="--stream")
    first_seed = draw_seed() if seed is None else seed
    body = request_body(
        model,
        **{"n": n, "seed": first_seed, "max_tokens": max_tokens, "stop": stop or None},
        **{"temperature": temperature, "top_p": top_p, "top_k": top_k, "repetition_penalty": repetition_penalty},
    )
    is_piped = prompt == "-" or (prompt is None and not sys.stdin.isatty())
    with Client(url) as client:
        if as_jsonl:
            prompts = read_lines() if is_piped else [PREVIEW_PROMPT if prompt is None else prompt]
            return _print_jsonl(client, body, prompts)
        if is_piped:
            prompt = _read_prompt(default=PREVIEW_PROMPT if prompt is None else "")
        body["prompt"] = prompt = PREVIEW_PROMPT if prompt is None else prompt
        if stream is None:
            stream = n == 1 and console.is_terminal and not as_json
        if stream:
            show.show_stream(console, prompt, client.stream(body), [])
        else:
            completion = client.complete(body)
            if as_json:
                print_json(completion)
            else:
                show.show_texts(console, prompt, [choice["text"] for choice in completion["choices"]])
    if seed is None:
        remark(f"The seed was {first_seed}.")


def request_body(model: str, **options: Any) -> Json:
    """What is None is left out: the model has its own."""
    said = {name: value for name, value in options.items() if value is not None}
    return {"model": model, "add_bos": True, **said}


def draw_seed() -> int:
    return secrets.randbits(_SEED_BITS)


# --- stdin ------------------------------------------------------------------------------------------------


def _read_prompt(default: str) -> str:
    """The whole of stdin, without the ends of its last lines; `default` where there is nothing."""
    return "\n".join(read_lines()).rstrip("\n") or default


def read_lines() -> Iterator[str]:
    """The lines of stdin without their ends, each as soon as it is there.

    By its descriptor: a thread that waits in Python's own reader when the command ends would abort it. Raises:
    typer.BadParameter where it is not UTF-8.
    """
    rest, stdin = b"", sys.stdin.fileno()
    while block := os.read(stdin, _READ_BYTES):
        *lines, rest = (rest + block).split(b"\n")
        yield from map(_decode, lines)
    if rest:
        yield _decode(rest)


def _decode(line: bytes) -> str:
    try:
        return line.removesuffix(b"\r").decode()
    except UnicodeDecodeError as exc:
        raise typer.BadParameter("stdin is not UTF-8.", param_hint="PROMPT") from exc


# --- JSON lines -------------------------------------------------------------------------------------------


def _print_jsonl(client: Client, body: Json, prompts: Iterable[str]) -> None:
    def complete(numbered: tuple[int, str]) -> list[Json]:
        number, prompt = numbered
        request = {**body, "prompt": prompt, "seed": body["seed"] + number}
        return [_as_line(request, choice) for choice in client.complete(request)["choices"]]

    for lines in _in_order(complete, enumerate(prompts)):
        for line in lines:
            typer.echo(show.json_text(line))


def _as_line(request: Json, choice: Json) -> dict[str, Any]:
    return {
        "model": request["model"],
        "prompt": request["prompt"],
        "text": choice["text"],
        "seed": request["seed"],
        "index": choice["index"],
        "finish_reason": choice["finish_reason"],
    }


def _in_order(act: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`act` of each item, a few at a time; each result as soon as it and those before it are there.

    `items` are taken by a thread: one that is late holds up no earlier result. No thread holds up the command's end.
    """
    results: Queue[Future[R] | None] = Queue(_AT_ONCE - 1)  # and one that is waited for

    def settle(result: Future[R], item: T) -> None:
        try:
            result.set_result(act(item))
        except BaseException as exc:
            result.set_exception(exc)

    def feed() -> None:
        try:
            for item in items:
                result: Future[R] = Future()
                results.put(result)
                Thread(target=settle, args=(result, item), daemon=True).start()
        except BaseException as exc:
            result = Future()
            result.set_exception(exc)
            results.put(result)
        results.put(None)

    Thread(target=feed, daemon=True).start()
    while (done := results.get()) is not None:
        yield done.result()
