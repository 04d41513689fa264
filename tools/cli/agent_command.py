"""``coase agent run``: an agent out of a file of the user's."""

from __future__ import annotations

import importlib.util
import signal
import sys
import traceback
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Final, get_args

import typer

from coase.protocol.errors import ComputeFailed, ConfigurationError

from .app import Json, app, emit, fail, out, perform, raise_user, say

if TYPE_CHECKING:
    from coase.agents.agent import Agent
    from coase.agents.compute.ports import Compute
    from coase.agents.config import Network
    from coase.agents.node import Node
    from coase.agents.steps import Notice
    from coase.protocol.session import Thread

WATCH_EVERY_S: Final = 1.0

agents = typer.Typer(help="Run agents.", no_args_is_help=True)
app.add_typer(agents, name="agent")


@agents.command("run")
def run_agent(
    target: Annotated[str, typer.Argument(metavar="FILE[:NAME]", help="A Python file.")],
    engine: Annotated[
        str, typer.Option(help="auto, ollama, llamacpp, openai, echo, or none.")
    ] = "auto",
    state: Annotated[
        Path | None, typer.Option(help="Directory for key and journal; the user's own without.")
    ] = None,
    json_: Json = False,
) -> None:
    """Run the agents that a file declares, until interrupted.

    Killed or interrupted, it goes on where it was when the same command is run again.

    Example: [b]coase agent run examples/seller.py[/b]
    """
    found = load_agents(target)

    async def work() -> None:
        await _run(found, engine, state, json_)

    perform(work)


def load_agents(target: str) -> list[Agent]:
    """Return the agents that ``FILE[:NAME]`` names: all of the file, or one.

    Ends the command if there is no such file or agent, or the file does not load.
    """
    from coase.agents.agent import Agent

    path, name = Path(target), ""
    if not path.exists():
        file, _, name = target.rpartition(":")
        path = Path(file or target)
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise_user(f"{path} {what}; name a Python file that declares an Agent")
    module = _load(path)
    found = {key: value for key, value in vars(module).items() if isinstance(value, Agent)}
    if name:
        picked = [agent for key, agent in found.items() if name in (key, agent.name)]
        if not picked:
            has = ", ".join(found) or "none"
            raise_user(f"{path} declares no agent {name!r}; it has: {has}")
        return picked[:1]
    if not found:
        raise_user(f'{path} declares no agent: write  seller = Agent("my-seller")  at its top')
    different = list({id(agent): agent for agent in found.values()}.values())
    names = [agent.name for agent in different]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise_user(f"{path} has two agents called {twice[0]!r}; give each a name of its own")
    return different


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"coase_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise_user(f"{path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    with _Blame(path):
        spec.loader.exec_module(module)
    return module


class _Blame:
    """Says which line of a user's file failed, instead of a trace of ours."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or isinstance(error, KeyboardInterrupt):
            return
        ours = self._path.resolve()
        frames = traceback.extract_tb(trace)
        own = [frame.lineno for frame in frames if Path(frame.filename).resolve() == ours]
        line = own[-1] if own else None
        if isinstance(error, SyntaxError) and error.filename:
            line = error.lineno if Path(error.filename).resolve() == ours else line
        where = f"{self._path}:{line}" if line else str(self._path)
        if isinstance(error, ConfigurationError):
            raise_user(f"{where}: {error}")
        if isinstance(error, SystemExit):
            raise_user(f"{where} ends the program when it is loaded; put that below __main__")
        text = error.msg if isinstance(error, SyntaxError) else str(error)
        what = f"{type(error).__name__}: {text}".rstrip(": ")
        raise_user(f"{where} does not load: {what}")


async def _run(found: list[Agent], engine: str, state: Path | None, as_json: bool) -> None:
    import anyio

    from coase.agents.config import load_network
    from coase.agents.node import open_node

    network = load_network()
    place = place_for(network, found[0].name, state)
    compute = await _engine(engine)
    try:
        fresh = not (place / "node.key.json").exists()
        async with open_node(network=network, state=place, compute=compute, registers=True) as node:
            if fresh:
                say(f"made a new key, kept in {place}")
            for agent in found:
                await node.add(agent)
            log = Log(node, found)
            node.runtime.observers.append(log.notice)
            with anyio.open_signal_receiver(
                signal.SIGINT, signal.SIGTERM, signal.SIGHUP
            ) as signals:
                await announce(node, found, place, as_json)
                log.tell_open("going on with")
                async with anyio.create_task_group() as group:
                    group.start_soon(watch_links, node)
                    async for _ in signals:
                        break
                    group.cancel_scope.cancel()
            log.farewell()
    finally:
        if compute is not None:
            with anyio.CancelScope(shield=True):
                await compute.close()


def place_for(network: Network, name: str, state: Path | None) -> Path:
    """Return the directory for key and journal.

    :raises ConfigurationError: if another process holds it
    """
    from .journals import held_by, node_home

    place = state or node_home(network) / name
    if holder := held_by(place):
        raise ConfigurationError(
            f"an agent {name!r} runs here already ({holder}, {place}): stop it, give this one"
            " another name, or another directory with --state"
        )
    return place


async def _engine(kind: str) -> Compute | None:
    """Return the engine that was asked for; with ``auto``, none if there is none here."""
    from coase.agents.compute.find import Kind, open_compute

    if kind == "none":
        return None
    try:
        if kind not in get_args(Kind):
            raise ConfigurationError(
                f"there is no engine {kind!r}: choose one of {', '.join(get_args(Kind))}, or none"
                " for handlers that need no engine"
            )
        return await open_compute(kind)
    except ComputeFailed as error:
        if kind != "auto":
            fail(error)
        say(f"no engine: {error}. Handlers that need none work all the same.", style="yellow")
        return None


async def announce(node: Node, found: list[Agent], place: Path, as_json: bool) -> None:
    """Say who runs, what they sell and what they have."""
    from coase.protocol.types import units_to_text

    from .purchases import fund

    asset = node.settlement.asset
    engine = node.compute.name if node.compute is not None else ""
    lines: list[dict[str, Any]] = []
    for agent in found:
        balance = await fund(node, agent)
        lines.append(
            {
                "agent": agent.name,
                "address": agent.address,
                "balance": f"{units_to_text(balance, asset.decimals)} {asset.symbol}",
                "balance_units": str(balance),
                "engine": engine,
                "sells": [
                    {"capability": offering.capability, "price": str(offering.price)}
                    for offering in agent.offerings.values()
                ],
            }
        )
    if as_json:
        emit({"net": node.network.net, "state": str(place), "agents": lines}, indent=None)
        return
    for line in lines:
        out.print(
            f"[b]{line['agent']}[/b] {line['address']} has {line['balance']}",
            highlight=False,
            soft_wrap=True,
        )
        for ware in line["sells"]:
            out.print(f"  sells {ware['capability']} at {ware['price']}", highlight=False)
        if not line["sells"]:
            out.print("  sells nothing", highlight=False)
    out.print(f"  engine: {engine or 'none'}; Ctrl-C ends it", highlight=False, soft_wrap=True)


async def watch_links(node: Node) -> None:
    """Tell when broker or chain go away and when they are back; both are sought for ever.

    :raises ConfigurationError: if another network has taken the place of the one we joined
    """
    import anyio

    from coase.agents.config import load_network

    there = {"broker": True, "chain": True}
    while True:
        await anyio.sleep(WATCH_EVERY_S)
        now = {
            "broker": node.transport.health().connected,
            "chain": not node.runtime.chain_error,
        }
        for what, answers in now.items():
            if answers != there[what]:
                if answers:
                    say(f"the {what} is back", style="green")
                else:
                    say(f"the {what} does not answer; trying until it does", style="yellow")
        there = now
        if all(now.values()):
            continue
        try:
            network = load_network()
        except ConfigurationError:
            continue  # Whoever ran it may be about to start it again.
        if network.escrow != node.network.escrow or network.nats != node.network.nats:
            raise ConfigurationError(
                "the network that this agent joined has ended, and another one runs now: start the"
                " agent again to join that"
            )


_TOLD: Final = {
    "said:offer": "offered to",
    "said:agreed": "agreed with",
    "chain:locked": "locked by",
    "said:result": "delivered to",
    "chain:disputed": "disputed by",
}


class Log:
    """Tells on standard error what agents do, and counts what they earn and spend."""

    def __init__(self, node: Node, found: list[Agent]) -> None:
        self._names = {agent.address: agent.name for agent in found}
        self._found = found
        self._asset = node.settlement.asset
        self._earned = dict.fromkeys(self._names, 0)
        self._deals = dict.fromkeys(self._names, 0)
        self._paused: dict[str, str] = {}

    def _money(self, units: int) -> str:
        from coase.protocol.types import units_to_text

        return units_to_text(units, self._asset.decimals)

    def notice(self, who: str, notice: Notice) -> None:
        """Say one thing that happened to the agent ``who``."""
        from .journals import short_name

        thread, name = notice.thread, self._names.get(who)
        if notice.kind == "paused" and name is not None and self._paused.get(who) != notice.detail:
            self._paused[who] = notice.detail
            say(f"{name}: paused: {notice.detail}; see: coase budget {name}", style="yellow")
        if thread is None or thread.terms is None or name is None or thread.is_contract:
            return
        other = f"{thread.counterparty[:10]} {short_name(thread.request.capability)}"
        if notice.kind == "ended" and thread.job_id:
            self._ended(who, name, other, thread)
        elif what := _TOLD.get(notice.kind) if thread.side == "seller" else None:
            say(f"{name}: {what} {other} {self._money(thread.terms.price_units)}")

    def _ended(self, who: str, name: str, other: str, thread: Thread) -> None:
        paid = thread.view.to_seller_units
        if thread.side == "buyer":
            say(f"{name}: {thread.state}, paid {self._money(paid)} to {other}")
            return
        if not paid:
            how = thread.view.how.name.lower().replace("_", " ")
            why = thread.why or how
            say(f"{name}: {thread.state}, nothing earned from {other} ({why})", style="yellow")
            return
        self._earned[who] += paid
        self._deals[who] += 1
        total = self._total(who)
        say(
            f"{name}: earned {self._money(paid)} from {other}; since the start {total}",
            style="green",
        )

    def _total(self, who: str) -> str:
        count = self._deals[who]
        deals = "1 deal" if count == 1 else f"{count} deals"
        return f"{self._money(self._earned[who])} {self._asset.symbol} with {deals}"

    def tell_open(self, what: str) -> int:
        """Say which deals are open; return how many."""
        from .journals import short_name

        count = 0
        for agent in self._found:
            desk = agent.seat.desk if agent.seat is not None else None
            for deal in desk.bound() if desk is not None else ():
                thread = desk.threads[deal] if desk is not None else None
                if thread is not None:
                    ware = short_name(thread.request.capability)
                    price = self._money(thread.agreed_terms.price_units)
                    say(f"{what} {deal[:8]}: {ware} for {price}, {thread.state}")
                    count += 1
        return count

    def farewell(self) -> None:
        """Say what was earned, and what is left open."""
        if self.tell_open("still open:"):
            say("the same command goes on with them; do so before their deadlines")
        for who, name in self._names.items():
            say(f"{name} stopped; earned {self._total(who)}")
