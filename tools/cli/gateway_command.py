"""``coase gateway``: your programs' own API, answered here or bought."""

from __future__ import annotations

import gc
import signal
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from coase.protocol.errors import ComputeFailed, ConfigurationError, JournalFailed

from .app import Json, app, emit, fail, first_cause, out, perform, raise_user, say
from .gateway_keys import NAME, directory_of, keys
from .gateway_usage import usage

if TYPE_CHECKING:
    from coase.agents.compute.market import MarketCompute
    from coase.agents.compute.ports import Compute
    from coase.agents.compute.ways import Place
    from coase.tools.gateway.server import Books, Doors
    from coase.tools.gateway.usage import UsageJournal

# As many as a small machine answers at once; whoever comes then is bought for, not queued.
LOCAL_AT_ONCE: Final = 4
# An office asks at once; whoever waits longer than its client likes goes away by itself.
QUEUE_MAX: Final = 512
# Deals that bargain and lock side by side; each holds what its answer may cost.
BOUGHT_AT_ONCE: Final = 32
ROOM_LOOK_S: Final = 5
REPLY_WITHIN_MS: Final = 2_500  # Who is busy does not answer; it is asked again soon.
STALL_HELP: Final = (
    "Seconds of silence until another seller goes on: until it has the task, and between two parts"
    " of its text; thrice that before the first."
)

gateways = typer.Typer(invoke_without_command=True)
gateways.add_typer(keys, name="keys")
gateways.command("usage")(usage)
app.add_typer(gateways, name="gateway")


@gateways.callback()
def gateway(
    context: typer.Context,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 11435,
    max_price: Annotated[
        str, typer.Option(help="The most for one prompt, such as 0.01; without, nothing is bought.")
    ] = "",
    budget: Annotated[
        str, typer.Option(help="The most in all, over restarts too; goes with --max-price.")
    ] = "",
    local: Annotated[
        bool, typer.Option("--local/--no-local", help="Use the engine of this machine first.")
    ] = True,
    engine: Annotated[str, typer.Option(help="auto, ollama, llamacpp, openai or echo.")] = "auto",
    url: Annotated[str, typer.Option(help="Of Ollama, or of a server with OpenAI's API.")] = "",
    at_once: Annotated[
        int, typer.Option(min=1, max=512, help="Answers of the engine here at a time.")
    ] = LOCAL_AT_ONCE,
    data: Annotated[
        str, typer.Option(help="Who may see prompts: here (this machine), firm or market.")
    ] = "market",
    stall: Annotated[int, typer.Option(min=1, max=600, help=STALL_HELP)] = 10,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name by which clients call it.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="A web page's origin, such as http://localhost:3000, or tauri://*."),
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="File of more API keys, one a line, without own budgets.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="Directory for key and journal; the user's own without.")
    ] = None,
    json_: Json = False,
) -> None:
    """Serve the APIs of OpenAI, Ollama and Anthropic on one port of this machine.

    Each prompt is answered by the engine here if that has the model and a place, else bought
    within the limits. The header x-coase-made of an answer says which. With coase gateway keys
    each caller gets a key with a budget of its own; coase gateway usage shows who used what.

    Example: [b]coase gateway --max-price 0.01 --budget 1[/b]
    """
    if context.invoked_subcommand is not None:
        return
    if bool(max_price) != bool(budget):
        raise_user("--max-price and --budget go together: the most for one prompt, and in all")
    firm = _in_a_firm()
    if not local and not max_price and not firm:
        raise_user("with --no-local all is bought: give --max-price and --budget")

    makes = _Making(engine, url, at_once) if local else None
    buys = _Buying(max_price, budget, stall, state) if max_price or firm else None

    async def work() -> None:
        directory = directory_of(state)
        doors = _doors(host, allow_host or [], allow_origin or [], key_file, directory)
        routing = _Routing(directory, _place_of(data))
        await _serve(makes, buys, doors, routing, _At(host, port), as_json=json_)

    perform(work)


def _in_a_firm() -> bool:
    """Return whether this machine's user is of a firm that could answer for nothing."""
    from coase.agents.config import network_path
    from coase.agents.firm import FirmFile

    return FirmFile().current() is not None and network_path().exists()


def _place_of(data: str) -> Place:
    """Return how far a prompt may go.

    :raises ConfigurationError: if that is no such place
    """
    from coase.agents.compute.ways import Place

    found = {place.name.lower(): place for place in Place}.get(data)
    if found is None:
        raise ConfigurationError(f"--data is here, firm or market, not {data!r}")
    return found


@dataclass(frozen=True, slots=True)
class _Routing:
    """Where is kept what is learnt of the ways, and how far a prompt may go."""

    directory: Path
    reach: Place


@dataclass(frozen=True, slots=True)
class _Making:
    """By which engine, and how many answers at a time."""

    engine: str
    url: str
    at_once: int


@dataclass(frozen=True, slots=True)
class _Buying:
    """Within what it buys."""

    max_price: str
    """Nothing where only the firm is asked."""
    budget: str
    stall: int
    state: Path | None


@dataclass(slots=True)
class _At:
    """Where it listens."""

    host: str
    port: int
    url: str = ""
    """As it is told; nothing before it listened at all."""


async def _serve(
    makes: _Making | None,
    buys: _Buying | None,
    doors: Doors,
    routing: _Routing,
    at: _At,
    *,
    as_json: bool,
) -> None:
    """Serve until a signal comes; while the disk refuses, say so to whoever asks.

    :raises JournalFailed: if the disk refuses from the beginning
    """
    while True:
        try:
            await _once(makes, buys, doors, routing, at, as_json=as_json)
            return
        except (JournalFailed, BaseExceptionGroup) as error:
            cause = first_cause(error)
            if not isinstance(cause, JournalFailed) or not at.url:
                raise
        _warn(f"{cause}; it goes on by itself when there is room")
        places = [routing.directory, *([buys.state] if buys is not None and buys.state else [])]
        await _wait_for_room(cause, places, at)


async def _wait_for_room(error: JournalFailed, places: list[Path], at: _At) -> None:
    """Answer everybody that the disk refuses, until it may take something again."""
    from coase.agents.room import wait_for_room
    from coase.tools.gateway.server import serving, sorry

    async with serving(sorry(error), host=at.host, port=at.port):
        await wait_for_room(*places, every_s=ROOM_LOOK_S)


async def _once(
    makes: _Making | None,
    buys: _Buying | None,
    doors: Doors,
    routing: _Routing,
    at: _At,
    *,
    as_json: bool,
) -> None:
    import anyio

    from coase.agents.compute.calllog import CallLog
    from coase.agents.compute.router import RouterCompute
    from coase.agents.compute.routing import Wish
    from coase.agents.runtime import clock_ms
    from coase.tools.gateway.server import application, serving
    from coase.tools.gateway.usage import DAY_MS, KEPT_DAYS, UsageJournal

    from .agent_command import watch_links

    async with AsyncExitStack() as stack:
        journal = stack.enter_context(closing(UsageJournal(routing.directory, say=_warn)))
        journal.forget(before_ms=clock_ms() - KEPT_DAYS * DAY_MS)
        own = await _local(makes, wanted=buys is None) if makes is not None else None
        if own is not None:
            stack.push_async_callback(own.close)
        market = await _market(stack, buys) if buys is not None else None
        calls = stack.enter_context(closing(CallLog(routing.directory, say=_warn)))
        at_once = makes.at_once if makes is not None else LOCAL_AT_ONCE
        wish = Wish(reach=routing.reach)
        router = RouterCompute(
            local=own, market=market, wish=wish, calls=calls, local_slots=at_once
        )
        stack.push_async_callback(router.close)
        books = _books(journal, market, buys)
        url = await stack.enter_async_context(
            serving(application(router, doors, books), host=at.host, port=at.port)
        )
        signals = stack.enter_context(
            anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        )
        if at.url:
            say("there is room again, and it goes on")
        else:
            at.port, at.url = int(url.rpartition(":")[2]), url
            await _announce(router, own, url, as_json=as_json)
        # What is loaded by now stays. To search it for rubbish too, as Python does every few
        # hundred answers, holds all of them up for 40 ms.
        gc.freeze()
        stack.callback(gc.unfreeze)
        async with anyio.create_task_group() as group:
            if market is not None and market.agent.node is not None:
                group.start_soon(watch_links, market.agent.node)
            await anext(signals)
            group.cancel_scope.cancel()


def _warn(text: str) -> None:
    say(text, style="yellow")


def _books(journal: UsageJournal, market: MarketCompute | None, buys: _Buying | None) -> Books:
    """Return who pays and where it is written down, told of every deal from now on."""
    from functools import partial

    from coase.agents.purse import rows_of
    from coase.tools.gateway.calls import Till
    from coase.tools.gateway.server import Books

    if market is None or buys is None:
        return Books(usage=journal)
    agent, node = market.agent, market.agent.node
    assert node is not None
    assert agent.seat is not None
    asset = node.settlement.asset
    till = Till(agent.purse, name=agent.name, place=str(buys.state or ""), market=market)
    node.runtime.observers.append(till.notice)
    node.runtime.observers.append(partial(journal.notice, asset, agent.address))
    past = rows_of(node.journal.summaries(agent.address))
    journal.heal(asset, agent.seat.desk.threads.values(), past)

    def trouble() -> JournalFailed | None:
        try:
            node.journal.append(())
        except JournalFailed as error:
            return error
        return None

    return Books(till=till, usage=journal, trouble=trouble)


def _doors(
    host: str, hosts: list[str], origins: list[str], key_file: Path | None, directory: Path
) -> Doors:
    try:
        from coase.tools.gateway.keys import KeyFile
        from coase.tools.gateway.server import LOOPBACK, Doors, read_keys
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"{error.name} is missing: pip install starlette uvicorn httptools (coase[gateway])"
        ) from None

    keys: tuple[str, ...] = ()
    if key_file is not None:
        try:
            keys = read_keys(key_file.read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{key_file} cannot be read: {error}") from None
    ring = KeyFile(directory)
    open_to_others = host not in ("localhost", "127.0.0.1", "::1")
    guarded = bool(keys or ring.read())
    if open_to_others and not guarded:
        raise ConfigurationError(
            f"{host} can be reached by others, who would spend your money: make keys with"
            " coase gateway keys add, or give --key-file"
        )
    if "*" in origins and not guarded:
        raise ConfigurationError(
            "--allow-origin * lets every web page spend your money: make keys with"
            " coase gateway keys add"
        )
    named = f"[{host}]" if ":" in host else host
    return Doors(
        hosts=(*LOOPBACK, named.lower(), *(name.lower() for name in hosts)),
        origins=tuple(origins),
        keys=keys,
        key_file=ring,
        keyed=open_to_others or "*" in origins,
    )


async def _local(makes: _Making, *, wanted: bool) -> Compute | None:
    """Return the engine of this machine; none if there is none and ``wanted`` is false."""
    from coase.agents.compute.find import ComputeConfig, find_compute
    from coase.agents.compute.gate import Limits

    from .sell_command import kind_of

    # Where everything can be bought nobody need wait.
    limits = Limits(concurrency=makes.at_once, queue_max=QUEUE_MAX if wanted else 0)
    config = ComputeConfig(kind=kind_of(makes.engine), url=makes.url, limits=limits)
    try:
        return await find_compute(config, say=say)
    except ComputeFailed as error:
        if wanted or makes.engine != "auto":
            fail(error)
        say(f"no engine here, all is bought: {error}", style="yellow")
        return None


async def _market(stack: AsyncExitStack, buys: _Buying) -> MarketCompute:
    """Join the market with an agent that buys within the limits."""
    from coase.agents.agent import Agent
    from coase.agents.compute.gate import Limits
    from coase.agents.compute.market import MarketCompute
    from coase.agents.config import load_network
    from coase.agents.node import open_node

    from .agent_command import place_for
    from .purchases import fund

    network = load_network()
    if buys.max_price and network.asset.money(buys.max_price).units == 0:
        raise ConfigurationError("--max-price is 0: name the most that an answer is worth to you")
    place = place_for(network, NAME, buys.state)
    node = await stack.enter_async_context(open_node(network=network, state=place))
    agent = await node.add(Agent(NAME, budget=buys.budget or "0"))
    limits = Limits(concurrency=BOUGHT_AT_ONCE, queue_max=QUEUE_MAX)
    if not buys.max_price:
        return MarketCompute(
            agent, max_price="0", settlements=("none",), stall_max_s=buys.stall, limits=limits
        )
    await fund(node, agent)
    return MarketCompute(
        agent,
        max_price=buys.max_price,
        stall_max_s=buys.stall,
        reply_within_ms=REPLY_WITHIN_MS,
        limits=limits,
    )


async def _announce(router: Compute, own: Compute | None, at: str, *, as_json: bool) -> None:
    if as_json:
        # Whoever sells is asked when somebody wants to know: that takes a while.
        models = [info.name for info in await own.models()] if own is not None else []
        emit({"url": at, "answers": router.name, "models": models}, indent=None)
        return
    for line in (
        f"listening on {at}; Ctrl-C ends it",
        f"  answered by {router.name}",
        f"  OpenAI: base_url {at}/v1   Ollama: host {at}   Anthropic: base_url {at}",
    ):
        out.print(line, highlight=False, soft_wrap=True, markup=False)
