"""A purchase from the command line: a node for one buyer, which finishes what it began.

A purchase may be killed at any moment. Its journal stays in the place that it held, and the next
command takes that place, says so, and brings the deal to its end.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import anyio

from coase.agents.agent import Agent
from coase.agents.asks import Ask, AskState
from coase.agents.config import Network
from coase.agents.node import Node, open_node
from coase.agents.purchasing import Purchase
from coase.agents.steps import Notice
from coase.agents.wiring import ensure_funds
from coase.escrow.backends.keystore import open_keystore
from coase.protocol.errors import (
    BudgetExhausted,
    ChainUnavailable,
    CoaseError,
    ConfigurationError,
    DealFailed,
)
from coase.protocol.messages import canonical_json
from coase.protocol.session import Thread, limit_s
from coase.protocol.states import Role, State, silence_of
from coase.protocol.types import ZERO_ADDRESS, units_to_text

from .app import say
from .journals import SLOTS_MAX, free_slot, short_name, unfinished_slots
from .scratch import scratch

NAME: Final = "shopper"
LOOKS: Final = "coase-look-"
TRIES: Final = 3
REST_MAX_S: Final = 10.0  # A settlement takes one or two blocks of a second.
QUIET_MAX_S: Final = 60.0  # A look at the market does not stay for the end of an old quarrel.
POLL_S: Final = 0.1
BOND_MAX_PERMILLE: Final = 500  # Of the price; agents.fairness refuses a higher one.


@asynccontextmanager
async def shopper(
    network: Network, *, place: Path | None = None, quiet: bool = False
) -> AsyncIterator[tuple[Node, Agent]]:
    """Yield a node with one buying agent, and stay afterwards until its money is at rest.

    :raises ConfigurationError: if no place for its state is free, or it has nothing to pay with
    """
    async with AsyncExitStack() as stack:
        node, agent = await _enter(stack, network, place)
        earlier = await _earlier(node, agent)
        if not quiet:
            names = _Teller(network, known=set(agent.seat.desk.threads if agent.seat else ()))
            node.runtime.observers.append(lambda _, notice: names.tell(notice))
            await fund(node, agent)
        elif not earlier:
            yield node, agent
            return
        try:
            yield node, agent
            await _rest(node, agent, quiet=quiet)
        except CoaseError:
            await _rest(node, agent, quiet=quiet)  # It may owe us a refund, or we an objection.
            raise
        finally:
            _say_open(node, agent)


@asynccontextmanager
async def looker(network: Network) -> AsyncIterator[tuple[Node, Agent]]:
    """Yield a node with an agent that only looks: its key is lost at the end, and holds nothing."""
    with scratch(LOOKS) as path:
        open_keystore(path)  # With a phrase of its own: nobody is asked for one in order to look.
        async with open_node(network=network, state=path) as node:
            yield node, await node.add(Agent(NAME))


async def _enter(stack: AsyncExitStack, network: Network, place: Path | None) -> tuple[Node, Agent]:
    """Take a place for our state; another purchase may be quicker to take it."""
    for _ in range(SLOTS_MAX):
        path = place or free_slot(network)
        fresh = not (path / "node.key.json").exists()
        try:
            node = await stack.enter_async_context(open_node(network=network, state=path))
        except ConfigurationError as error:
            if place is None and "is held by" in str(error):
                continue
            raise
        agent = await node.add(Agent(NAME))
        if fresh:
            say(f"made a key for your purchases: {agent.address} (in {path})")
        return node, agent
    raise ConfigurationError("too many purchases begin at once; try again")


async def fund(node: Node, agent: Agent) -> int:
    """Make sure that an agent of ours has test money on a local chain; say where it came from.

    Returns what it holds.
    """
    settlement = node.settlement
    before = await settlement.balance(agent.address)
    after = await ensure_funds(settlement, node.network, agent.address)
    asset = settlement.asset
    if after > before:
        got = f"{units_to_text(after - before, asset.decimals)} {asset.symbol}"
        say(f"{agent.name} had no funds: the local faucet gave it {got}")
    elif after == 0 and not agent.offerings:
        raise ConfigurationError(
            f"{agent.address} holds no {asset.symbol} and this network has no faucet: send it some,"
            " and a little of the chain's coin for gas"
        )
    return after


async def buy_once(
    node: Node,
    agent: Agent,
    capability: str,
    task: dict[str, Any],
    schemas: tuple[dict[str, Any], dict[str, Any]],
    max_price: str,
    wish: dict[str, Any],
) -> Purchase[Any]:
    """Buy, unless an earlier command that was killed has this very thing under way already.

    :raises DealFailed: if nobody delivered
    """
    open_ask = _same(agent, capability, canonical_json(task))
    if open_ask is not None:
        say("the same was being bought when an earlier command ended: going on with that purchase")
        bought = await _take_up(node, agent, open_ask)
        if bought is not None:
            return bought
        say("that purchase came to nothing; buying anew")
    affordable = await _affordable(node, agent, max_price)
    failure: DealFailed | None = None
    blocked: set[str] = set()
    for _ in range(TRIES):
        try:
            return await agent.buy(
                capability, task, schemas=schemas, max_price=affordable, blocked=blocked, **wish
            )
        except BudgetExhausted as error:
            raise failure or error from None  # What failed before may still hold the money.
        except DealFailed as error:
            if not error.deal_id:
                raise failure or error from None
            failure = error
            blocked.add(agent.seller_of(error.deal_id))
            say(f"that deal failed ({error.state}: {error.why}); asking others")
    assert failure is not None
    raise failure


async def _affordable(node: Node, agent: Agent, max_price: str) -> str:
    """Return the most to pay: what the user names, or what is free if that is less.

    What other purchases of this key still need is not free. The bond of an offer counts when it
    is weighed, but is said here: it may be what an offer is refused for.
    """
    asset = node.settlement.asset
    if agent.seat is None or agent.buying is None:
        return max_price
    await node.runtime.look_at_means(agent.seat)
    free = min(agent.buying.means.rooms().values(), default=None)
    if free is None:
        raise ChainUnavailable(f"the chain does not tell what {agent.address} holds")
    price, text = asset.money(max_price).units, units_to_text(max(free, 0), asset.decimals)
    if price + price * BOND_MAX_PERMILLE // 1_000 <= free:
        return max_price
    less = f"less than --max-price {max_price} and" if price > free else "which must pay for"
    say(
        f"{agent.address} holds {text} {asset.symbol} for it, {less} the bond of a dispute, up to"
        " half a price: dearer offers are not taken",
        style="yellow",
    )
    if free <= 0:
        raise BudgetExhausted(limit="balance", asked_units=price, left_units=0)
    return max_price if price <= free else text


def _same(agent: Agent, capability: str, task: str) -> Ask | None:
    asks = agent.buying.asks.values() if agent.buying is not None else ()
    for ask in asks:
        full = ask.wish.capability
        alive = ask.chosen and ask.state is not AskState.ENDED
        if alive and capability in (full, short_name(full)) and ask.wish.task == task:
            return ask
    return None


async def _take_up(node: Node, agent: Agent, ask: Ask) -> Purchase[Any] | None:
    """Return the result of a deal of an earlier life, or None if it came to nothing."""
    if agent.seat is None:
        return None
    threads, thread = agent.seat.desk.threads, None
    while (now := threads.get(ask.chosen)) is not None:
        thread = now
        if thread.verdict:
            break
        await anyio.sleep(POLL_S)
    thread = ask.outcome or thread
    if thread is None or thread.verdict != "good" or thread.result is None:
        return None
    asset = node.settlement.asset
    return Purchase(
        result=thread.result.result,
        seller=thread.counterparty,
        deal=thread.deal,
        request=thread.request_id,
        price_units=thread.agreed_terms.price_units,
        paid_units=int(thread.result.to_seller_units),
        usage=dict(thread.result.usage),
        symbol=asset.symbol,
        decimals=asset.decimals,
    )


async def finish_earlier(network: Network) -> None:
    """Bring what earlier commands left open as far as it goes now."""
    for place in unfinished_slots(network):
        async with shopper(network, place=place, quiet=True):
            pass


def _bound(agent: Agent) -> list[Thread]:
    if agent.seat is None:
        return []
    desk = agent.seat.desk
    return [desk.threads[deal] for deal in desk.bound() if deal in desk.threads]


async def _earlier(node: Node, agent: Agent) -> list[Thread]:
    """Say which deals of an earlier command are still open; they go on from here."""
    found = _bound(agent)
    for thread in found:
        say(f"an earlier purchase is still open: {_describe(node, thread)}; going on with it")
    return found


def _describe(node: Node, thread: Thread) -> str:
    asset = node.settlement.asset
    price = units_to_text(thread.agreed_terms.price_units, asset.decimals)
    return (
        f"{thread.deal[:8]} {short_name(thread.request.capability)} for {price} {asset.symbol} from"
        f" {thread.counterparty[:10]}, {thread.state}"
    )


async def _rest(node: Node, agent: Agent, *, quiet: bool = False) -> None:
    """Stay while our deals still move, and as long as one can be lost by our absence.

    ``quiet`` is for a command that only looks: it stays no longer than a minute, and not at all
    for a seller that is still at work.
    """
    told: set[tuple[str, State]] = set()
    clock = anyio.current_time
    until_s = clock() + REST_MAX_S
    with anyio.move_on_after(QUIET_MAX_S if quiet else math.inf):
        while bound := _bound(agent):
            risky = [thread for thread in bound if _at_risk(agent, thread)]
            risky = [thread for thread in risky if thread.verdict or not quiet]
            for thread in risky:
                if (thread.deal, thread.state) not in told:
                    told.add((thread.deal, thread.state))
                    say(_why_we_stay(node, thread), style="yellow")
            if risky:
                until_s = clock() + REST_MAX_S
            elif clock() >= until_s:
                return
            await anyio.sleep(POLL_S)


def _at_risk(agent: Agent, thread: Thread) -> bool:
    """Return whether the price can be lost by nobody being here to speak for the buyer."""
    if thread.side is not Role.BUYER or thread.verdict == "good":
        return False
    if thread.agreed_terms.arbiter == ZERO_ADDRESS:
        return False  # There is nobody to speak to.
    match thread.state:
        case State.LOCKED | State.DELIVERED:
            return True
        case State.DISPUTED | State.ANSWERED:
            return agent.seat is not None and not agent.seat.desk.was_shown(thread.deal)
    return False


def _why_we_stay(node: Node, thread: Thread) -> str:
    name = f"deal {thread.deal[:8]}"
    match thread.state:
        case State.LOCKED:
            why = (
                f"until then the seller of {name} may hand in its work, good or bad, and is paid"
                " for it unless we dispute that; after it the price comes back"
            )
        case State.DELIVERED:
            why = f"until then what was handed in for {name} must be disputed, or is paid for"
        case _:
            why = f"the arbiter of {name} has not taken our evidence yet, and rules without it"
    price = units_to_text(thread.agreed_terms.price_units, node.settlement.asset.decimals)
    return (
        f"staying until {_clock(limit_s(thread))} at the latest: {why}. Ctrl-C now can lose the"
        f" {price} {node.settlement.asset.symbol}; the next coase command, such as coase status,"
        " goes on with it"
    )


def _clock(time_s: int | None) -> str:
    moment = datetime.fromtimestamp(time_s or 0, tz=UTC).astimezone()
    return f"{moment:%H:%M:%S}"


def _say_open(node: Node, agent: Agent) -> None:
    """Say what is left open, and what becomes of it."""
    for thread in _bound(agent):
        silence = silence_of(thread.state, thread.method)
        say(
            f"still open: {_describe(node, thread)}. If the {silence.who} stays silent past"
            f" {silence.by} ({_clock(limit_s(thread))}), {silence.outcome}; any later coase status"
            " goes on with it"
        )
        if _at_risk(agent, thread):
            say(
                f"the price of {thread.deal[:8]} can be lost while no coase command runs: run"
                f" coase status before {_clock(limit_s(thread))}, and again until it is closed",
                style="yellow",
            )


class _Teller:
    """Says on standard error how a purchase goes."""

    def __init__(self, network: Network, *, known: set[str]) -> None:
        self._decimals, self._symbol = network.decimals, network.symbol
        self._known = known
        """Threads of an earlier command; they are not news of this purchase."""

    def tell(self, notice: Notice) -> None:
        """Say one thing that happened."""
        thread = notice.thread
        line = ""
        if notice.kind == "asked":
            line = f"asking for {short_name(notice.detail)}"
        elif thread is not None and thread.terms is not None:
            line = self._words(notice, thread)
            if line and thread.deal in self._known:
                line = f"earlier purchase {thread.deal[:8]}: {line}"
        if line:
            say(line)

    def _words(self, notice: Notice, thread: Thread) -> str:
        price = units_to_text(thread.agreed_terms.price_units, self._decimals)
        seller = thread.counterparty[:10]
        match notice.kind:
            case "heard:offer":
                return f"{seller} offers at {price}"
            case "said:counter":
                return f"countered with {price}"
            case "agreed":
                return f"agreed with {seller} for at most {price} {self._symbol}"
            case "chain:locked":
                return f"locked {price} in the escrow"
            case "bad_result":
                return f"refused the result: {notice.detail}"
            case "chain:disputed":
                return "disputed the delivery, with a bond; the arbiter decides"
            case "ended" if thread.job_id:
                return self._ended(thread)
        return ""

    def _ended(self, thread: Thread) -> str:
        view = thread.view
        back = units_to_text(view.to_buyer_units, self._decimals)
        if thread.state is State.REFUNDED:
            return f"refunded {back} {self._symbol} ({view.how.name.lower().replace('_', ' ')})"
        if thread.state is State.SETTLED:
            paid = units_to_text(view.to_seller_units, self._decimals)
            return f"settled: {paid} {self._symbol} to the seller, {back} back"
        return f"{thread.state}: {thread.why}" if thread.why else str(thread.state)
