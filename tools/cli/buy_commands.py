"""``coase ask`` and ``coase hire``: buy from whoever offers."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from coase.protocol.errors import ConfigurationError

from .app import Json, app, emit, out, perform, printable, raise_user, say, show_json

if TYPE_CHECKING:
    from coase.agents.agent import Agent
    from coase.agents.node import Node
    from coase.agents.purchasing import Purchase

INPUT_SIZE_MAX_BYTES: Final = 4 * 1024 * 1024
PROMPT_SIZE_MAX_CHARS: Final = 200_000  # What the schema of inference takes.
_CAPABILITY: Final = re.compile(r"[a-z][a-z0-9-]{0,40}\Z")

MaxPrice = Annotated[
    str, typer.Option("--max-price", help="The most that you pay, in tokens, such as 0.01.")
]
Within = Annotated[int, typer.Option("--within", min=1, max=3600, help="Seconds to deliver.")]


@app.command()
def ask(
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads standard input.")],
    max_price: MaxPrice,
    max_tokens: Annotated[int, typer.Option(min=1, max=32768, help="Longest answer.")] = 200,
    model: Annotated[str, typer.Option(help="Only this model.")] = "",
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="For a repeatable answer.")] = 0,
    within: Within = 60,
    json_: Json = False,
) -> None:
    """Buy inference from whoever offers it within the price.

    Example: [b]coase ask "Why is the sky blue?" --max-price 0.01[/b]
    """
    text = _read_stdin() if prompt == "-" else prompt
    if not text.strip():
        raise_user("the prompt is empty; write it as an argument, or - to read standard input")
    if len(text) > PROMPT_SIZE_MAX_CHARS:
        raise_user(
            f"the prompt has {len(text)} characters, and inference takes {PROMPT_SIZE_MAX_CHARS}"
        )
    if len(model) > 128:
        raise_user("--model takes a name of at most 128 characters")

    async def work() -> None:
        from coase.agents.wares import Completion, Inference

        task = Inference(prompt=text, max_tokens=max_tokens, model=model, seed=seed)
        size = len(text.encode())
        wish: dict[str, Any] = {
            "deliver_within": within,
            "model": model,
            # No tokenizer makes more than a token of two bytes of text, and a template some more.
            "input_max": size // 2 + 64,
            "output_max": max_tokens,
            "features": {"bytes": size},
        }
        schemas = (Inference.model_json_schema(), Completion.model_json_schema())
        await _buy("inference", task.model_dump(mode="json"), schemas, max_price, wish, json_)

    perform(work)


@app.command()
def hire(
    capability: Annotated[str, typer.Argument(help="A name or id, such as summarise.")],
    input_: Annotated[str, typer.Option("--input", help="JSON file with the task; - for stdin.")],
    max_price: MaxPrice,
    within: Within = 120,
    json_: Json = False,
) -> None:
    """Buy a piece of work of any capability that somebody sells.

    The task is JSON that fits the capability's input schema; for one with a single text field a
    plain text file will do.

    Example: [b]coase hire summarise --input notes.txt --max-price 0.05[/b]
    """
    if not _CAPABILITY.match(capability):
        raise_user(
            f"{capability!r} is no capability: lower-case letters, digits and hyphens, such as"
            " summarise; see what is on sale with: coase status"
        )
    text = read_input(input_)

    async def work() -> None:
        await _buy(capability, text, None, max_price, {"deliver_within": within}, json_)

    perform(work)


def read_input(name: str) -> str:
    """Return the text of a file, or with - of standard input; ends the command if there is none."""
    text = _read_stdin() if name == "-" else _read_file(name)
    if not text.strip():
        raise_user(f"{'standard input' if name == '-' else name} is empty: there is no task")
    return text


def _read_stdin() -> str:
    return _decode(sys.stdin.buffer.read(INPUT_SIZE_MAX_BYTES + 1), "standard input")


def _read_file(name: str) -> str:
    path = Path(name)
    try:
        if path.is_dir():
            raise_user(f"{name} is a directory; name one file with the task")
        with path.open("rb") as file:
            return _decode(file.read(INPUT_SIZE_MAX_BYTES + 1), name)
    except FileNotFoundError:
        raise_user(f"{name} does not exist; name a file with the task, or - for stdin")
    except (OSError, ValueError) as error:
        raise_user(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}")


def _decode(content: bytes, name: str) -> str:
    if len(content) > INPUT_SIZE_MAX_BYTES:
        raise_user(f"{name} is over {INPUT_SIZE_MAX_BYTES >> 20} MiB, the most that is sent")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise_user(
            f"{name} is no UTF-8 text (byte {error.start}); convert it, for example with"
            " iconv -t UTF-8"
        )
    if "\0" in text:
        raise_user(f"{name} is no text: it holds NUL bytes")
    return text


async def _buy(
    capability: str,
    task: dict[str, Any] | str,
    schemas: tuple[dict[str, Any], dict[str, Any]] | None,
    max_price: str,
    wish: dict[str, Any],
    as_json: bool,
) -> None:
    """Buy, print what was bought, and stay until the money has come to rest."""
    from coase.agents.config import load_network

    network = load_network()
    if network.asset.money(max_price).units == 0:
        raise ConfigurationError(
            "--max-price is 0: name the most that the work is worth to you, such as 0.01"
        )
    from .purchases import buy_once, shopper

    async with shopper(network) as (node, agent):
        if schemas is None:
            capability, schemas = await _schemas(node, agent, capability)
        if isinstance(task, str):
            task = await _task(task, schemas[0])
        live = _Live()
        if capability == "inference" and out.is_terminal and not as_json:
            wish = {**wish, "on_text": live.write}
        bought = await buy_once(node, agent, capability, task, schemas, max_price, wish)
        _show(bought, as_json=as_json, inference=capability == "inference", live=live)


class _Live:
    """An answer on the screen while it is written."""

    def __init__(self) -> None:
        self.shown = ""

    def write(self, text: str) -> None:
        """Print how it goes on."""
        text = printable(text)
        self.shown += text
        out.print(text, end="", highlight=False, markup=False, soft_wrap=True)

    def rest_of(self, text: str) -> str:
        """Return what is still to be printed: all of it if something else was shown."""
        if text.startswith(self.shown):
            return text[len(self.shown) :]
        return f"\n{text}"


def _show(bought: Purchase[Any], *, as_json: bool, inference: bool, live: _Live) -> None:
    result = json.loads(bought.result)
    if as_json:
        emit(_document(bought, result))
        return
    values = list(result.values()) if isinstance(result, dict) else [result]
    text = result["text"] if inference else values[0] if len(values) == 1 else None
    if isinstance(text, str):
        text = live.rest_of(printable(text))
        out.print(text, highlight=False, markup=False, soft_wrap=True)
    else:
        show_json(result)
    say(f"paid {bought.paid} to {bought.seller} (deal {bought.deal})")


async def _schemas(
    node: Node, agent: Agent, capability: str
) -> tuple[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return a capability's id and schemas: the fixed ones, or what its sellers answer."""
    from coase.agents.forms import find_form

    form, ignored = await find_form(node, agent, capability)
    if ignored:
        say(
            f"ignored {ignored} of the answers: their schemas are not those of a {capability}",
            style="yellow",
        )
    return form.capability, form.schemas


async def _task(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Return the task that ``text`` spells, as JSON or as the one required text field."""
    from coase.agents.checks import fault_in_time

    try:
        task = json.loads(text)
    except (ValueError, RecursionError):
        task = None
    required = schema.get("required", [])
    fields = schema.get("properties", {})
    if not isinstance(task, dict):
        if len(required) != 1 or fields.get(required[0], {}).get("type") != "string":
            names = ", ".join(required) or "no required fields"
            raise ConfigurationError(f"the task must be a JSON object; its fields: {names}")
        task = {required[0]: text}
    fault = await fault_in_time(json.dumps(task), json.dumps(schema))
    if fault:
        wrong = fault.removeprefix("the result ").removeprefix("does not fit its schema: ")
        names = ", ".join(fields) or "none"
        raise ConfigurationError(f"the task does not fit: {wrong}; its fields: {names}")
    return task


def _document(bought: Purchase[Any], result: Any) -> dict[str, Any]:
    return {
        "result": result,
        "seller": bought.seller,
        "deal": bought.deal,
        "price_units": str(bought.price_units),
        "paid_units": str(bought.paid_units),
        "paid": bought.paid,
        "usage": bought.usage,
    }
