"""``coase ask`` and ``coase hire``: buy from whoever offers."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from coase.agents.agent import Agent, Purchase
from coase.agents.config import Network, load_network, state_home
from coase.agents.node import Node, open_node
from coase.agents.steps import Notice
from coase.agents.wares import FIXED, Completion, Inference
from coase.protocol.errors import ConfigurationError, DealFailed
from coase.protocol.session import Thread
from coase.protocol.types import units_to_text

from .agent_command import fund, raise_user
from .app import Json, app, emit, err, out, perform

SLOTS_MAX: Final = 32  # Purchases of one user that may run at one time.
INPUT_SIZE_MAX_BYTES: Final = 4 * 1024 * 1024

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
    seed: Annotated[int, typer.Option(min=0, help="For a repeatable answer.")] = 0,
    within: Within = 60,
    json_: Json = False,
) -> None:
    """Buy inference from whoever offers it within the price.

    Example: [b]coase ask "Why is the sky blue?" --max-price 0.01[/b]
    """
    text = sys.stdin.read(INPUT_SIZE_MAX_BYTES) if prompt == "-" else prompt
    if not text.strip():
        raise_user("the prompt is empty; write it as an argument, or - to read standard input")
    task = Inference(prompt=text, max_tokens=max_tokens, model=model, seed=seed)
    bought = perform(lambda: _ask(task, max_price, within))
    if json_:
        emit(_document(bought, bought.result.model_dump()))
        return
    out.print(bought.result.text, highlight=False, markup=False)
    _receipt(bought)


async def _ask(task: Inference, max_price: str, within: int) -> Purchase[Completion]:
    async with shopper() as (_, agent):
        return await agent.purchase(
            "inference",
            task,
            returns=Completion,
            max_price=max_price,
            deliver_within=within,
            model=task.model,
            # No tokenizer makes more than a token of two bytes of text, and a template some more.
            input_max=len(task.prompt.encode()) // 2 + 64,
            output_max=task.max_tokens,
            features={"bytes": len(task.prompt.encode())},
            tries=3,
        )


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
    text = _read_input(input_)
    bought = perform(lambda: _hire(capability, text, max_price, within))
    result = json.loads(bought.result)
    if json_:
        emit(_document(bought, result))
        return
    values = list(result.values()) if isinstance(result, dict) else [result]
    if len(values) == 1 and isinstance(values[0], str):
        out.print(values[0], highlight=False, markup=False)
    else:
        out.print_json(data=result)
    _receipt(bought)


def _read_input(name: str) -> str:
    try:
        if name == "-":
            return sys.stdin.read(INPUT_SIZE_MAX_BYTES)
        path = Path(name)
        if path.stat().st_size > INPUT_SIZE_MAX_BYTES:
            raise_user(f"{name} is over {INPUT_SIZE_MAX_BYTES} bytes")
        return path.read_text()
    except FileNotFoundError:
        raise_user(f"{name} does not exist; --input names a file with the task, or - for stdin")
    except (OSError, UnicodeDecodeError) as error:
        raise_user(f"{name} cannot be read: {error}")


async def _hire(capability: str, text: str, max_price: str, within: int) -> Purchase[Any]:
    async with shopper() as (node, agent):
        full, schemas = await _schemas(node, agent, capability)
        return await agent.buy(
            full,
            _task(text, schemas[0]),
            schemas=schemas,
            max_price=max_price,
            deliver_within=within,
            tries=3,
        )


async def _schemas(
    node: Node, agent: Agent, capability: str
) -> tuple[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return a capability's id and schemas: the fixed ones, or what its sellers answer."""
    if capability in FIXED:
        task, result = FIXED[capability]
        return capability, (task.model_json_schema(), result.model_json_schema())
    found = await node.discover(agent, capability)
    ids = sorted({description.capability for _, description in found})
    if not ids:
        raise DealFailed("lapsed", f"nobody sells {capability!r} here; see: coase status")
    if len(ids) > 1:
        raise ConfigurationError(f"{capability} has several forms here, name one: {', '.join(ids)}")
    description = found[0][1]
    return ids[0], (json.loads(description.input_schema), json.loads(description.output_schema))


def _task(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Return the task that ``text`` spells, as JSON or as the one required text field."""
    try:
        task = json.loads(text)
    except ValueError:
        task = None
    if isinstance(task, dict):
        from coase.agents.checks import result_fault

        fault = result_fault(json.dumps(task), json.dumps(schema))
        if fault:
            raise ConfigurationError(f"the task does not fit: {fault.removeprefix('the result ')}")
        return task
    required = schema.get("required", [])
    if len(required) == 1 and schema["properties"][required[0]].get("type") == "string":
        return {required[0]: text}
    raise ConfigurationError(
        f"the task must be a JSON object with: {', '.join(required) or 'no fields'}"
    )


@asynccontextmanager
async def shopper() -> AsyncIterator[tuple[Node, Agent]]:
    """Yield a node with one buying agent, in the first of its places that is free."""
    network = load_network()
    agent = Agent("shopper")
    async with open_node(network=network, state=free_slot(network)) as node:
        node.runtime.observers.append(lambda _, notice: _tell(notice))
        await node.add(agent)
        await fund(node, agent)
        yield node, agent


def free_slot(network: Network) -> Path:
    """Return a state directory that no other purchase of this user holds now.

    :raises ConfigurationError: if all are held
    """
    from coase.agents.backends.sqlite import StateDirectory

    for number in range(SLOTS_MAX):
        path = node_home(network) / f"shopper-{number}"
        try:
            StateDirectory(path).release()
        except ConfigurationError:
            continue
        return path
    raise ConfigurationError(f"{SLOTS_MAX} purchases of yours run already; wait for one of them")


def node_home(network: Network) -> Path:
    """Return where the nodes of one network keep their state: a fresh chain, a fresh place."""
    return state_home() / "nodes" / f"{network.net}-{network.escrow[2:10]}"


def _tell(notice: Notice) -> None:
    """Say on standard error how a purchase goes."""
    thread = notice.thread
    line = _words(notice, thread) if thread is not None and thread.terms is not None else ""
    if notice.kind == "asked":
        line = f"asking for {notice.detail}"
    if line:
        err.print(f"[dim]{line}[/]", highlight=False)


def _words(notice: Notice, thread: Thread) -> str:
    price = units_to_text(thread.agreed_terms.price_units, 6)
    seller = thread.counterparty[:10]
    match notice.kind:
        case "heard:offer":
            return f"{seller} offers at {price}"
        case "said:counter":
            return f"countered with {price}"
        case "agreed":
            return f"agreed with {seller} for at most {price}"
        case "chain:locked":
            return f"locked {price} in the escrow"
        case "bad_result":
            return f"refused the result: {notice.detail}"
        case "ended" if thread.job_id:
            return f"{thread.state}: {thread.why}"
    return ""


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


def _receipt(bought: Purchase[Any]) -> None:
    err.print(
        f"[dim]paid {bought.paid} to {bought.seller} (deal {bought.deal})[/]", highlight=False
    )
