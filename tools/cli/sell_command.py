"""``coase sell``: what the engine of this machine writes, to whoever pays for it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from .app import Json, app, err, perform, say

if TYPE_CHECKING:
    from coase.agents.agent import Agent
    from coase.agents.compute.ports import Compute
    from coase.agents.inference import Stock
    from coase.negotiation.pricing import Price

    from .till import Till

REFRESH_PER_S: Final = 4
QUEUE_PER_SLOT: Final = 1  # Whoever waits for more than one other is better served elsewhere.
LOOK_EVERY_S: Final = 15  # At what the engine has; people pull and remove models while it serves.
# Dearer by so much for each that waits, and where another model has to be loaded first.
WAITING_PERMILLE: Final = 100
COLD_PERMILLE: Final = 200


@app.command()
def sell(
    price_input: Annotated[
        str, typer.Option(help="Tokens of money for a million tokens read.")
    ] = "2",
    price_output: Annotated[
        str, typer.Option(help="Tokens of money for a million tokens written.")
    ] = "8",
    price_cached: Annotated[
        str, typer.Option(help="The same for what the engine still knew; as for the rest without.")
    ] = "",
    floor: Annotated[
        int, typer.Option(min=0, max=100, help="Percent of these below which you do not go.")
    ] = 60,
    busier: Annotated[
        int, typer.Option(min=0, max=1_000, help="Percent dearer when all places are taken.")
    ] = 25,
    strategy: Annotated[
        str, typer.Option(help="fixed, boulware, linear, conceder or reciprocal.")
    ] = "linear",
    capacity: Annotated[int, typer.Option(min=1, max=64, help="Prompts at once; more wait.")] = 4,
    engine: Annotated[str, typer.Option(help="auto, ollama, llamacpp, openai or echo.")] = "auto",
    url: Annotated[str, typer.Option(help="Of Ollama, or of a server with OpenAI's API.")] = "",
    model: Annotated[str, typer.Option(help="The default model; else the engine's own.")] = "",
    name: Annotated[
        str, typer.Option(help="Of the selling agent; a key belongs to it.")
    ] = "oracle",
    region: Annotated[
        str, typer.Option(help="Where it runs, in your words, such as eu-west; some ask for that.")
    ] = "",
    stake: Annotated[
        str, typer.Option(help="What it keeps in the vault, to lose if it fails; 0 takes all back.")
    ] = "",
    state: Annotated[
        Path | None, typer.Option(help="Directory for key and journal; the user's own without.")
    ] = None,
    json_: Json = False,
) -> None:
    """Sell what the models of this machine write, by the token, until interrupted.

    Offers the models of your Ollama, of any server with OpenAI's API, or the embedded one. It
    measures how fast they are, asks more when it is busy or must load a model first, and bids only
    for what can be there in time. With --json it prints a line when it is ready, and one a deal.

    Example: [b]coase sell --price-output 6[/b]
    """

    async def work() -> None:
        from coase.agents.compute.find import ComputeConfig, find_compute
        from coase.agents.compute.gate import Limits
        from coase.agents.config import load_network
        from coase.agents.inference import region_checked

        from .agent_command import place_for

        network = load_network()
        place = place_for(network, name, state)
        price = _price(price_input, price_cached, price_output, floor, busier)
        price.in_asset(network.asset)  # Says now what is wrong with it.
        where = region_checked(region)
        limits = Limits(concurrency=capacity, queue_max=capacity * QUEUE_PER_SLOT)
        config = ComputeConfig(kind=kind_of(engine), url=url, model=model, limits=limits)
        compute = await find_compute(config, say=say)
        try:
            agent, stock = await _agent(compute, name, price, strategy, capacity)
            agent.stake, stock.region = stake, where
            await _run(agent, stock, compute, place, as_json=json_)
        finally:
            await _closed(compute)

    perform(work)


async def _closed(compute: Compute) -> None:
    import anyio

    with anyio.CancelScope(shield=True):
        await compute.close()


def _price(read: str, cached: str, written: str, floor: int, busier: int) -> Price:
    from coase.negotiation.pricing import Markup, Price

    return Price.per_million(
        input=read,
        cached_input=cached or None,
        output=written,
        floor_permille=floor * 10,
        markup=Markup(
            load_permille=busier * 10, job_permille=WAITING_PERMILLE, cold_permille=COLD_PERMILLE
        ),
    )


def kind_of(engine: str) -> Any:
    """Return the kind of engine; ends the command if there is none of that name."""
    from typing import get_args

    from coase.agents.compute.find import Kind

    from .app import raise_user

    if engine not in get_args(Kind):
        raise_user(f"there is no engine {engine!r}: choose one of {', '.join(get_args(Kind))}")
    return engine


async def _agent(
    compute: Compute, name: str, price: Price, strategy: str, capacity: int
) -> tuple[Agent, Stock]:
    """Read what the engine has, measure it, and return the agent that sells it."""
    from coase.agents.inference import Stock, inference_agent

    stock = Stock(concurrency=capacity)
    say("seeing what the engine has and how fast it is")
    await stock.read(compute)
    about = f"{compute.name}, {stock.speed}"
    agent = inference_agent(
        name,
        price=price,
        stock=stock,
        strategy=strategy,  # type: ignore[arg-type] # Said so, if there is none of that name.
        capacity=capacity * (1 + QUEUE_PER_SLOT),
        about=about,
    )
    return agent, stock


async def _run(agent: Agent, stock: Stock, compute: Compute, place: Path, *, as_json: bool) -> None:
    import anyio
    from rich.live import Live

    from coase.agents.node import open_node
    from coase.agents.purse import rows_of

    from .agent_command import watch_links
    from .purchases import fund
    from .till import Till

    async with open_node(state=place, compute=compute, registers=True) as node:
        await node.add(agent)
        balance = await fund(node, agent)
        till = Till(node, agent, stock, as_json=as_json)
        till.recall(rows_of(node.journal.summaries(agent.address)))
        node.runtime.observers.append(till.notice)
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            till.opened(balance, compute.name)
            screen = err.is_terminal and not as_json
            async with anyio.create_task_group() as group:
                group.start_soon(watch_links, node)
                group.start_soon(_watch_engine, stock, compute, till)
                if screen:
                    with Live(
                        get_renderable=till.table, console=err, refresh_per_second=REFRESH_PER_S
                    ):
                        await anext(signals)
                else:
                    till.told = True
                    await anext(signals)
                group.cancel_scope.cancel()
        say(f"{agent.name}: {till.total()}")


async def _watch_engine(stock: Stock, compute: Compute, till: Till) -> None:
    """Look for ever what the engine has and has loaded, and say when it goes and comes back."""
    import anyio

    while True:
        await anyio.sleep(LOOK_EVERY_S)
        away = stock.away
        if await stock.refresh(compute):
            till.changed()
        if stock.away and not away:
            say(f"nothing is offered: {stock.away}", style="yellow")
        elif away and not stock.away:
            say("the engine is back", style="green")
