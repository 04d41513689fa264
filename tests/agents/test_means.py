"""No deal whose price and bond the buyer's own tokens do not cover: at the accept, and at the lock.

Who cannot post the bond cannot dispute, so that a cheat may keep the price of nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import anyio
import pytest

from coase.agents import Agent, BudgetExhausted, Job, Price
from coase.agents.means import Means
from coase.agents.wares import Summarise, Summary
from coase.protocol.errors import ChainUnavailable, DealFailed
from coase.protocol.session import Thread
from coase.protocol.states import Role, State
from tests.agents.desks import Market as Desks
from tests.agents.desks import kind_of
from tests.agents.market import SHORT, Market, market
from tests.protocol.threads import TERMS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from coase.agents.asks import Ask
    from coase.agents.seller import Windows

PRICE, BOND = 80_000, 40_000
DEAR = replace(SHORT, bond_permille=500)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Market]:
    async with market(tmp_path) as running:
        yield running


def scribe(name: str = "scribe", *, windows: Windows = DEAR, price: str = "0.08") -> Agent:
    agent = Agent(name)

    @agent.offers("summarise", price=Price.per_task(price), deliver_within=4, windows=windows)
    async def summarise(task: Summarise, job: Job) -> Summary:
        return Summary(summary=task.text[:10])

    return agent


async def buy(
    buyer: Agent, text: str = "one", check: Callable[[Summary], str | None] | None = None
) -> int:
    bought = await buyer.purchase(
        "summarise",
        Summarise(text=text),
        returns=Summary,
        max_price="0.08",
        hope_permille=1_000,
        decide_after_ms=100,
        reply_within_ms=2_000,
        check=check,
    )
    return bought.paid_units


# ---- what is left ------------------------------------------------------------------------------


def deal(name: str, state: State, *, verdict: str = "", side: Role = Role.BUYER) -> Thread:
    terms = replace(TERMS, price_units=1_000, bond_units=100)
    base = Desks().sellers[0]
    return Thread(
        deal=name,
        side=side,
        holder=base.desk.me,
        counterparty=base.desk.me,
        request_id="r",
        request=None,  # type: ignore[arg-type]
        domain=base.desk.domain,
        secret=b"",
        state=state,
        terms=terms,
        verdict=verdict,
    )


@pytest.mark.parametrize(
    ("thread", "needed"),
    [
        (deal("a", State.ACCEPTED), 1_100),
        (deal("a", State.AGREED), 1_100),
        (deal("a", State.LOCKED), 100),
        (deal("a", State.DELIVERED), 100),
        (deal("a", State.DELIVERED, verdict="it is nonsense"), 100),
        (deal("a", State.DELIVERED, verdict="good"), 0),
        (deal("a", State.DISPUTED), 0),
        (deal("a", State.ANSWERED), 0),
        (deal("a", State.LOCKED, side=Role.SELLER), 0),
    ],
)
def test_a_deal_needs_its_price_until_it_is_locked_and_its_bond_until_it_is_good(
    thread: Thread, needed: int
) -> None:
    means = Means(lambda: [thread], name="buyer")
    means.know(5_000)
    assert means.rooms() == {"buyer: balance": 5_000 - needed}
    means.accept(5_000 - needed)
    with pytest.raises(BudgetExhausted) as raised:
        means.accept(5_001 - needed)
    assert (raised.value.limit, raised.value.left_units) == ("buyer: balance", 5_000 - needed)


def test_of_what_is_agreed_the_first_to_lock_has_it_and_the_rest_waits() -> None:
    first, second = deal("a", State.AGREED), deal("b", State.AGREED)
    deals = [first, second]
    means = Means(lambda: deals, name="buyer")
    means.know(1_200)
    means.open(first)
    means.open(first)
    with pytest.raises(BudgetExhausted):
        means.open(second)
    # Locked: the price is gone from the balance, and the bond must stay there.
    deals[0] = replace(first, state=State.LOCKED)
    means.know(1_199)
    with pytest.raises(BudgetExhausted):
        means.open(second)
    means.know(1_200)
    means.open(second)


def test_nothing_is_promised_while_nobody_knows_what_there_is() -> None:
    means = Means(list, name="buyer")
    for known in (None, 1_000, None):
        means.know(known)
        means.check()
        if known is None:
            assert means.rooms() == {}
            with pytest.raises(BudgetExhausted, match="not known while the chain is away"):
                means.accept(1)
        else:
            means.accept(known)


# ---- at the desk -------------------------------------------------------------------------------


def accepted(desks: Desks) -> tuple[Ask, Means]:
    """Return a request of which an offer was accepted with the buyer's last unit."""
    means = desks.buying.means = Means(desks.buying.under_way, name="buyer")
    means.know(1_000)
    desks.lost = lambda to, wire: kind_of(wire) == "agreed"
    ask = desks.ask()
    desks.until(lambda: ask.chosen)
    desks.lost = lambda to, wire: False
    return ask, means


def test_what_is_agreed_is_not_locked_until_it_is_covered() -> None:
    desks = Desks(prices=(1_000,))
    ask, means = accepted(desks)
    means.know(999)
    desks.until(lambda: desks.buyer.desk.threads[ask.chosen].state is State.AGREED)
    desks.pass_ms(2_000)
    assert desks.chain.held() == 0
    told = [n for n in desks.buyer.notices if n.kind == "budget_exhausted"]
    assert [notice.detail for notice in told] == [
        "the limit 'buyer: balance' has 999 units left and 1000 were asked for"
    ]
    means.know(1_000)
    desks.until(lambda: ask.outcome)
    assert ask.outcome is not None
    assert ask.outcome.state is State.SETTLED


def test_an_agreement_that_is_never_covered_lapses_and_locks_nothing() -> None:
    desks = Desks(prices=(1_000,))
    ask, means = accepted(desks)
    means.know(None)
    desks.until(lambda: ask.outcome)
    assert ask.outcome is not None
    assert (ask.outcome.state, desks.chain.held()) == (State.LAPSED, 0)


# ---- on the market -----------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_price_that_leaves_no_bond_is_not_paid(place: Market) -> None:
    seller, buyer = scribe(), Agent("buyer")
    await place.join(seller)
    await place.join(buyer, units=PRICE + BOND - 1)
    with pytest.raises(BudgetExhausted) as raised:
        await buy(buyer)
    short = raised.value
    assert (short.limit, short.left_units) == ("buyer: balance", PRICE + BOND - 1)
    assert short.asked_units == PRICE + BOND
    await place.rest()
    assert place.chain.balance(buyer.address) == PRICE + BOND - 1


@pytest.mark.anyio
async def test_the_last_unit_disputes_a_bad_result_and_comes_back(place: Market) -> None:
    seller, buyer = scribe(), Agent("buyer")
    await place.join(seller)
    await place.join(buyer, units=PRICE + BOND)
    place.chain.mint(seller.address, BOND)
    offering = next(iter(seller.offerings.values()))

    async def lie(task: Summarise, job: Job) -> Summary:
        return Summary.model_construct(summary="")

    seller.offerings = {offering.capability: replace(offering, handler=lie)}
    with pytest.raises(DealFailed, match="does not fit its schema"):
        await buy(buyer)
    await place.rest()
    assert place.chain.balance(buyer.address) == PRICE + BOND


@pytest.mark.anyio
async def test_purchases_at_once_share_what_there_is(place: Market) -> None:
    seller, buyer = scribe(), Agent("buyer")
    await place.join(seller)
    held = 2 * PRICE + 2 * BOND
    await place.join(buyer, units=held)
    least = held
    paid: list[int] = []
    short: list[BudgetExhausted] = []

    def watch(*_: object) -> None:
        nonlocal least
        desk = buyer.buying
        assert desk is not None
        bonds = sum(BOND for t in desk.under_way() if t.state is State.LOCKED and not t.verdict)
        least = min(least, place.chain.balance(buyer.address) - bonds)

    place.node.runtime.observers.append(watch)

    async def one(number: int) -> None:
        try:
            paid.append(await buy(buyer, str(number)))
        except BudgetExhausted as error:
            short.append(error)

    async with anyio.create_task_group() as group:
        for number in range(5):
            group.start_soon(one, number)
    await place.rest()
    assert len(paid) == 2
    assert len(short) == 3
    assert least >= 0
    assert place.chain.balance(buyer.address) == held - 2 * PRICE


@pytest.mark.anyio
async def test_while_the_chain_is_away_nothing_is_accepted(
    place: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    seller, buyer = scribe(), Agent("buyer")
    await place.join(seller, buyer)

    async def away(owner: str) -> int:
        raise ChainUnavailable("nobody answers")

    balance = place.node.settlement.balance
    monkeypatch.setattr(place.node.settlement, "balance", away)
    with pytest.raises(BudgetExhausted, match="not known while the chain is away"):
        await buy(buyer)
    monkeypatch.setattr(place.node.settlement, "balance", balance)
    assert await buy(buyer) == PRICE
