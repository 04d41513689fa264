"""``coase agent run``: an agent out of a file of the user's."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import anyio
import typer

from coase.agents.agent import Agent
from coase.agents.node import Node, open_node
from coase.agents.steps import Notice
from coase.agents.wiring import ensure_funds
from coase.protocol.errors import ConfigurationError
from coase.protocol.types import units_to_text

from .app import Json, app, err, out, perform

agents = typer.Typer(help="Run agents.", no_args_is_help=True)
app.add_typer(agents, name="agent")


@agents.command("run")
def run_agent(
    target: Annotated[str, typer.Argument(metavar="FILE[:NAME]", help="A Python file.")],
    engine: Annotated[
        str, typer.Option(help="auto, ollama, llamacpp, openai, echo, or none.")
    ] = "auto",
    json_: Json = False,
) -> None:
    """Run the agents that a file declares, until interrupted.

    Example: [b]coase agent run examples/seller.py[/b]
    """
    found = load_agents(target)
    perform(lambda: _run(found, engine, json_))


def load_agents(target: str) -> list[Agent]:
    """Return the agents that ``FILE[:NAME]`` names: all of the file, or one.

    :raises ConfigurationError: if there is no such file or agent, or the file does not load
    """
    file, _, name = target.partition(":")
    path = Path(file)
    if not path.is_file():
        raise_user(f"{file} does not exist; name a Python file that declares an Agent")
    spec = importlib.util.spec_from_file_location(f"coase_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise_user(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except ConfigurationError as error:
        raise_user(f"{file}: {error}")
    except (ImportError, SyntaxError, NameError, AttributeError, TypeError, ValueError) as error:
        raise_user(f"{file} does not load: {type(error).__name__}: {error}")
    all_ = {key: value for key, value in vars(module).items() if isinstance(value, Agent)}
    if name:
        picked = [a for key, a in all_.items() if name in (key, a.name)]
        if not picked:
            raise_user(f"{file} declares no agent {name!r}; it has: {', '.join(all_) or 'none'}")
        return picked
    if not all_:
        raise_user(f'{file} declares no agent: write  seller = Agent("my-seller")  at its top')
    return list({agent.name: agent for agent in all_.values()}.values())


def raise_user(text: str) -> NoReturn:
    """End the command with a line for its user and the exit code for user's mistakes."""
    from .app import fail

    fail(ConfigurationError(text))


async def _run(found: list[Agent], engine: str, as_json: bool) -> None:
    from coase.agents.compute.find import open_compute

    compute = await open_compute(engine) if engine != "none" else None
    try:
        async with open_node(name=found[0].name, compute=compute) as node:
            for agent in found:
                await node.add(agent)
            await _announce(node, found, as_json)
            names = {agent.address: agent.name for agent in found}
            node.runtime.observers.append(lambda who, notice: _log(names.get(who, ""), notice))
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                async for _ in signals:
                    break
    finally:
        if compute is not None:
            await compute.close()


async def _announce(node: Node, found: list[Agent], as_json: bool) -> None:
    asset = node.settlement.asset
    for agent in found:
        balance = await fund(node, agent)
        wares = [
            {"capability": offering.capability, "price": str(offering.price)}
            for offering in agent.offerings.values()
        ]
        line = {
            "agent": agent.name,
            "address": agent.address,
            "balance": f"{units_to_text(balance, asset.decimals)} {asset.symbol}",
            "engine": node.compute.name if node.compute is not None else "",
            "sells": wares,
        }
        if as_json:
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
            continue
        out.print(f"[b]{agent.name}[/b] {agent.address}  {line['balance']}")
        for ware in wares:
            out.print(f"  sells {ware['capability']} at {ware['price']}")
        if node.compute is not None:
            out.print(f"  engine: {node.compute.name}", highlight=False)


async def fund(node: Node, agent: Agent) -> int:
    """Make sure that an agent of ours has test money on a local chain; say where it came from."""
    settlement = node.settlement
    before = await settlement.balance(agent.address)
    after = await ensure_funds(settlement, node.network, agent.address)
    if after > before:
        asset = settlement.asset
        got = f"{units_to_text(after - before, asset.decimals)} {asset.symbol}"
        err.print(f"{agent.name} was empty: the local faucet gave it {got}", highlight=False)
    return after


_TOLD = {
    "said:offer": "offered",
    "said:agreed": "agreed with",
    "chain:locked": "locked by",
    "said:result": "delivered to",
    "chain:disputed": "disputed by",
}


def _log(name: str, notice: Notice) -> None:
    """Tell on standard error what an agent does."""
    thread = notice.thread
    if thread is None or thread.terms is None:
        return
    what = _TOLD.get(notice.kind)
    price = units_to_text(thread.terms.price_units, 6)
    if notice.kind == "ended" and thread.job_id:
        what = f"{thread.state} with"
        price = units_to_text(thread.view.to_seller_units, 6)
    if what:
        ware = thread.request.capability
        err.print(f"{name}: {what} {thread.counterparty[:10]} {ware} {price}", highlight=False)
