"""``coase sell``: what the engine of this machine writes, to whoever pays for it."""

from __future__ import annotations

import signal
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from .app import Json, app, emit, err, out, perform, say

if TYPE_CHECKING:
    from rich.table import Table

    from coase.agents.agent import Agent
    from coase.agents.compute.ports import Compute
    from coase.agents.inference import Stock
    from coase.agents.node import Node
    from coase.agents.steps import Notice
    from coase.negotiation.pricing import Price
    from coase.protocol.session import Thread

ROWS_MAX: Final = 12  # Deals on the screen; the journal has them all.
REFRESH_PER_S: Final = 4
QUEUE_PER_SLOT: Final = 1  # Whoever waits for more than one other is better served elsewhere.


@app.command()
def sell(
    price_input: Annotated[
        str, typer.Option(help="Tokens of money for a million tokens read.")
    ] = "2",
    price_output: Annotated[
        str, typer.Option(help="Tokens of money for a million tokens written.")
    ] = "8",
    floor: Annotated[
        int, typer.Option(min=0, max=100, help="Percent of these below which you do not go.")
    ] = 60,
    strategy: Annotated[
        str, typer.Option(help="fixed, boulware, linear, conceder or reciprocal.")
    ] = "linear",
    capacity: Annotated[int, typer.Option(min=1, max=64, help="Prompts at once.")] = 4,
    engine: Annotated[str, typer.Option(help="auto, ollama, llamacpp, openai or echo.")] = "auto",
    url: Annotated[str, typer.Option(help="Of Ollama, or of a server with OpenAI's API.")] = "",
    model: Annotated[str, typer.Option(help="The default model; else the engine's own.")] = "",
    name: Annotated[
        str, typer.Option(help="Of the selling agent; a key belongs to it.")
    ] = "oracle",
    state: Annotated[
        Path | None, typer.Option(help="Directory for key and journal; the user's own without.")
    ] = None,
    json_: Json = False,
) -> None:
    """Sell what the models of this machine write, by the token, until interrupted.

    Offers the models of your Ollama, of any server with OpenAI's API, or the embedded one. It
    measures how fast they are, and bids only for what can be there in time. With --json it
    prints one line when it is ready, and one for each deal that is over.

    Example: [b]coase sell --price-output 6[/b]
    """

    async def work() -> None:
        from coase.agents.compute.find import ComputeConfig, find_compute
        from coase.agents.compute.gate import Limits
        from coase.agents.config import load_network
        from coase.negotiation.pricing import Price

        from .agent_command import place_for

        network = load_network()
        place = place_for(network, name, state)
        price = Price.per_million(input=price_input, output=price_output, floor_permille=floor * 10)
        price.in_asset(network.asset)  # Says now what is wrong with it.
        limits = Limits(concurrency=capacity, queue_max=capacity * QUEUE_PER_SLOT)
        config = ComputeConfig(kind=kind_of(engine), url=url, model=model, limits=limits)
        compute = await find_compute(config, say=say)
        try:
            agent, stock = await _agent(compute, name, price, strategy, capacity)
            await _run(agent, stock, compute, place, as_json=json_)
        finally:
            import anyio

            with anyio.CancelScope(shield=True):
                await compute.close()

    perform(work)


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

    from .agent_command import watch_links
    from .purchases import fund

    async with open_node(state=place, compute=compute) as node:
        await node.add(agent)
        balance = await fund(node, agent)
        till = _Till(node, agent, stock, as_json=as_json)
        node.runtime.observers.append(till.notice)
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            till.opened(balance, compute.name)
            screen = err.is_terminal and not as_json
            async with anyio.create_task_group() as group:
                group.start_soon(watch_links, node)
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


class _Till:
    """Counts what was earned, and shows it."""

    def __init__(self, node: Node, agent: Agent, stock: Stock, *, as_json: bool) -> None:
        self._agent, self._stock, self._as_json = agent, stock, as_json
        self._asset = node.settlement.asset
        self._rows: dict[str, tuple[str, str, str, str, str]] = {}
        self._earned_units = 0
        self._deals = 0
        self.told = False
        """Whether deals are said line by line, where no table shows them."""

    def _money(self, units: int) -> str:
        from coase.protocol.types import units_to_text

        return f"{units_to_text(units, self._asset.decimals)} {self._asset.symbol}"

    def total(self) -> str:
        """Return what was earned since the start."""
        deals = "1 deal" if self._deals == 1 else f"{self._deals} deals"
        return f"earned {self._money(self._earned_units)} with {deals}"

    def opened(self, balance: int, engine: str) -> None:
        """Say who sells what."""
        offering = next(iter(self._agent.offerings.values()))
        if self._as_json:
            document = {
                "agent": self._agent.name,
                "address": self._agent.address,
                "balance_units": str(balance),
                "engine": engine,
                "models": list(self._stock.names),
                "speed": self._stock.speed,
                "price": str(offering.price),
                "capability": offering.capability,
            }
            emit(document, indent=None)
            return
        models = ", ".join(self._stock.names)
        for line in (
            f"{self._agent.name} {self._agent.address} has {self._money(balance)}",
            f"  sells {models} of {engine} ({self._stock.speed})",
            f"  at {offering.price}; Ctrl-C ends it",
        ):
            out.print(line, highlight=False, soft_wrap=True, markup=False)

    def notice(self, who: str, notice: Notice) -> None:
        """Take note of what happened in one of our deals."""
        thread = notice.thread
        if who != self._agent.address or thread is None or thread.terms is None:
            return
        if not thread.job_id or thread.side != "seller":
            return
        earned = thread.view.to_seller_units
        over = notice.kind == "ended"
        if over:
            self._earned_units += earned
            self._deals += 1
        usage = dict(thread.result.usage) if thread.result is not None else {}
        written = str(usage.get("output_tokens", ""))
        money = self._money(earned) if over else f"at most {self._money(thread.terms.price_units)}"
        row = (thread.counterparty[:10], thread.terms.work.model, str(thread.state), written, money)
        clock = f"{datetime.now().astimezone():%H:%M:%S}"
        self._rows[thread.deal] = (clock, *row[:3], " ".join(row[3:]).strip())
        while len(self._rows) > ROWS_MAX:
            del self._rows[next(iter(self._rows))]
        if over:
            self._over(thread, earned, usage)

    def _over(self, thread: Thread, earned: int, usage: dict[str, int]) -> None:
        if self._as_json:
            document = {
                "deal": thread.deal,
                "buyer": thread.counterparty,
                "model": thread.agreed_terms.work.model,
                "state": str(thread.state),
                "usage": usage,
                "earned_units": str(earned),
                "total_units": str(self._earned_units),
            }
            emit(document, indent=None)
        elif self.told:
            say(
                f"{self._agent.name}: {thread.state}, {self._money(earned)} from"
                f" {thread.counterparty[:10]}; since the start {self.total()}"
            )

    def table(self) -> Table:
        """Return the latest deals and the total."""
        from rich.table import Table

        table = Table(caption=f"{self.total()}; {self._stock.speed}", expand=False)
        for title in ("time", "buyer", "model", "state", "tokens written, money"):
            table.add_column(title)
        for row in self._rows.values():
            table.add_row(*row)
        return table
