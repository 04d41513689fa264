"""A purse: no limit is passed, whoever asks at once, and whatever was forgotten in between."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coase.agents import Agent, Budget, Job, Price
from coase.agents.asks import AskState
from coase.agents.purse import OpenPurse, Purse, spent_on
from coase.agents.wares import Summarise, Summary
from coase.protocol.errors import BudgetExhausted, ConfigurationError, DealFailed
from coase.protocol.states import State
from coase.protocol.types import How
from tests.agents.desks import ASSET
from tests.agents.desks import Market as Desks
from tests.agents.market import SHORT, Market, market

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

ANN, BOB = "0x" + "a1" * 20, "0x" + "b0" * 20
HOUR_MS = 3_600_000
TASK = Summarise(text="A lighthouse sells what cannot be sold.")
PRICE_UNITS, BOND_UNITS = 20_000, 2_000


# ---- the purse alone ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "-1", "1e3", "0.0000001x", " 1", "1.", ".5", "nan", "1\n"])
def test_a_budget_that_is_no_plain_decimal_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="plain decimal"):
        Budget(per_day=text)
    with pytest.raises(ConfigurationError, match="plain decimal"):
        Agent("buyer", budget=text)


def test_a_budget_is_no_number() -> None:
    with pytest.raises(ConfigurationError, match="in quotes"):
        Budget(total=0.5)  # type: ignore[arg-type]


def test_a_budget_finer_than_the_asset_is_refused_once_the_asset_is_known() -> None:
    with pytest.raises(ConfigurationError, match="finer"):
        Purse(Budget(total="0.0000001"), ASSET)


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        (Budget(total="0.001"), "agent: in all"),
        (Budget(per_deal="0.001"), "agent: per deal"),
        (Budget(per_counterparty="0.001"), "agent: per counterparty"),
        (Budget(per_hour="0.001"), "agent: per hour"),
        (Budget(per_day="0.001"), "agent: per day"),
    ],
)
def test_each_limit_holds_at_its_last_unit_and_says_its_name(budget: Budget, name: str) -> None:
    purse = Purse(budget, ASSET)
    with pytest.raises(BudgetExhausted) as raised:
        purse.reserve("deal", 1_001, ANN, now_ms=0)
    error = raised.value
    assert (error.limit, error.asked_units, error.left_units) == (name, 1_001, 1_000)
    assert purse.open_units == 0
    purse.reserve("deal", 1_000, ANN, now_ms=0)
    purse.reserve("deal", 1_000, ANN, now_ms=0)
    assert purse.open_units == 1_000
    purse.book.audit()


def test_what_comes_back_comes_back_to_every_limit() -> None:
    purse = Purse(Budget(total="0.001", per_hour="0.001", per_counterparty="0.001"), ASSET)
    purse.reserve("a", 1_000, ANN, now_ms=0)
    purse.lock("a", now_ms=0)
    purse.spend("a", 400, now_ms=0)
    assert set(purse.rooms(ANN, now_ms=0).values()) == {600}
    purse.reserve("b", 600, ANN, now_ms=0)
    purse.release("b", now_ms=0)
    purse.release("b", now_ms=0)
    purse.reserve("b", 600, ANN, now_ms=0)
    with pytest.raises(BudgetExhausted):
        purse.check(now_ms=0)
    assert (purse.balance.available_units, purse.balance.locked_units) == (0, 600)
    assert purse.balance.spent_units == 400


def test_hours_slide_and_the_total_does_not() -> None:
    purse = Purse(Budget(total="0.0015", per_hour="0.001"), ASSET)
    purse.reserve("a", 1_000, ANN, now_ms=0)
    purse.spend("a", 1_000, now_ms=0)
    with pytest.raises(BudgetExhausted, match="per hour"):
        purse.reserve("b", 1, ANN, now_ms=HOUR_MS - 1)
    purse.reserve("b", 500, ANN, now_ms=HOUR_MS)
    with pytest.raises(BudgetExhausted, match="in all"):
        purse.reserve("c", 1, BOB, now_ms=10 * HOUR_MS)


def test_nothing_is_locked_that_was_not_set_aside() -> None:
    for budget in (Budget(), Budget(total="1")):
        purse = Purse(budget, ASSET)
        with pytest.raises(BudgetExhausted, match="reserved for deal"):
            purse.lock("deal", now_ms=0)


def test_an_open_purse_never_says_no() -> None:
    purse = OpenPurse()
    purse.check(now_ms=0)
    purse.reserve("deal", 10**30, ANN, now_ms=0)
    purse.lock("deal", now_ms=0)
    assert purse.shortfall(10**30, ANN, now_ms=0) is None
    assert not purse.limited


@pytest.mark.parametrize(
    ("how", "to_buyer_units", "spent"),
    [
        (How.OPEN, 0, 0),  # Never locked.
        (How.SETTLED, 300, 700),
        (How.UNDELIVERED, 1_000, 0),
        (How.SILENT_SELLER, 1_000, 0),
        (How.RULED, 1_000, 0),
        (How.RULED, 0, 1_100),  # The arbiter's fee is the bond of whoever lost.
        (How.RULED, 250, 750 + 75),
        (How.SILENT_ARBITER, 500, 500),
    ],
)
def test_a_deal_costs_what_did_not_come_back(how: How, to_buyer_units: int, spent: int) -> None:
    cost = spent_on(price_units=1_000, bond_units=100, to_buyer_units=to_buyer_units, how=how)
    assert cost == spent


def row(deal: str, at_ms: int, units: int, spent: int, who: str = ANN) -> dict[str, Any]:
    """Return what the journal keeps of a deal that is over."""
    return {
        "side": "buyer",
        "deal": deal,
        "counterparty": who,
        "price_units": units,
        "bond_units": 0,
        "to_buyer_units": units - spent,
        "how": "settled" if spent else "undelivered",
        "history": [
            [at_ms - 5, "offered", "seller", "offer", units, ""],
            [at_ms, "accepted", "buyer", "accept", units, ""],
        ],
    }


@given(
    st.lists(
        st.tuples(
            st.sampled_from(("reserve", "lock", "spend", "release", "wait")),
            st.integers(0, 5),
            st.integers(1, 700),
        ),
        max_size=40,
    )
)
def test_no_story_passes_a_limit_and_a_restart_remembers_all_of_it(
    story: list[tuple[str, int, int]],
) -> None:
    budget = Budget(total="0.003", per_deal="0.0005", per_hour="0.001", per_counterparty="0.002")
    purse, now_ms = Purse(budget, ASSET), 0
    held: dict[str, tuple[int, int, str]] = {}
    over: list[dict[str, Any]] = []
    for number, (move, which, units) in enumerate(story):
        who = (ANN, BOB)[which % 2]
        deal = next((d for d in held if d.startswith(f"{which} ")), f"{which} {number}")
        match move:
            case "wait":
                now_ms += units * 10_000
            case "reserve" if deal not in held:
                short = purse.shortfall(units, who, now_ms=now_ms)
                if short is None:
                    purse.reserve(deal, units, who, now_ms=now_ms)
                    held[deal] = (now_ms, units, who)
                else:
                    with pytest.raises(BudgetExhausted) as raised:
                        purse.reserve(deal, units, who, now_ms=now_ms)
                    assert raised.value.limit == short.limit
                    assert raised.value.left_units == short.left_units
            case "lock" if deal in held:
                purse.lock(deal, now_ms=now_ms)
            case "spend" | "release" if deal in held:
                at_ms, most, counterparty = held.pop(deal)
                spent = min(units, most) if move == "spend" else 0
                purse.spend(deal, spent, now_ms=now_ms)
                over.append(row(deal, at_ms, most, spent, counterparty))
        purse.book.audit()
        spent_units = sum(r["price_units"] - r["to_buyer_units"] for r in over)
        open_units = sum(units for _, units, _ in held.values())
        assert purse.open_units == purse.balance.locked_units == open_units
        assert purse.balance.spent_units == spent_units
        assert open_units + spent_units <= 3_000
    again = Purse(budget, ASSET)
    again.recall([], [*over, *(row(d, at, u, u, who) for d, (at, u, who) in held.items())])
    for who in (ANN, BOB):
        assert again.rooms(who, now_ms=now_ms) == purse.rooms(who, now_ms=now_ms)


def test_a_budget_that_was_made_smaller_counts_what_was_promised_under_the_larger() -> None:
    purse = Purse(Budget(total="0.001"), ASSET)
    purse.recall([], [row("a", 5, 4_000, 4_000)])
    assert purse.rooms(ANN, now_ms=9) == {"agent: in all": -3_000}
    with pytest.raises(BudgetExhausted) as raised:
        purse.check(now_ms=9)
    assert raised.value.left_units == 0
    purse.book.audit()


def test_a_long_life_carries_its_balance_over_and_keeps_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("coase.agents.purse.ENDED_MAX", 3)
    purse, plain = Purse(Budget(total="1"), ASSET), Purse(Budget(total="1"), ASSET)
    first_book = purse.book
    for each in (purse, plain):
        each.reserve("promised", 7, ANN, now_ms=0)
        each.reserve("locked", 11, ANN, now_ms=0)
        each.lock("locked", now_ms=0)
    for number in range(4):
        purse.reserve(f"{number}", 100, BOB, now_ms=0)
        purse.spend(f"{number}", 30 * number, now_ms=0)
    plain.reserve("all", 180, BOB, now_ms=0)
    plain.spend("all", 180, now_ms=0)
    assert purse.book is not first_book
    assert purse.balance == plain.balance
    purse.book.audit()
    for deal in ("promised", "locked"):
        purse.lock(deal, now_ms=0)
        purse.spend(deal, 5, now_ms=0)
    assert purse.balance.spent_units == 190
    assert purse.open_units == 0


def test_what_others_bought_of_us_and_what_was_never_accepted_is_no_spending() -> None:
    sold = {**row("a", 5, 4_000, 4_000), "side": "seller"}
    offered = {**row("b", 5, 4_000, 4_000), "history": []}
    purse = Purse(Budget(total="0.001"), ASSET)
    purse.recall([], [sold, offered])
    assert purse.rooms(ANN, now_ms=9) == {"agent: in all": 1_000}


# ---- the purse and the desk ---------------------------------------------------------------------


def test_a_restart_keeps_what_is_locked_and_what_is_spent_and_no_more() -> None:
    desks = Desks(prices=(1_000,))
    desks.buying.reserve = first = Purse(Budget(total="0.0025"), ASSET)
    ask = desks.ask("one")
    desks.until(lambda: ask.outcome)
    desks.works = False
    open_ask = desks.ask("two")
    desks.until(lambda: "task" in desks.kinds()[-1:] or open_ask.state is AskState.BOUND)
    rows = [json.loads(data) for _, data in desks.buyer.closed if data]
    desks.restart(desks.buyer, purse=OpenPurse())
    again = Purse(Budget(total="0.0025"), ASSET)
    again.recall(desks.buyer.desk.threads.values(), rows)
    assert again.balance == first.balance
    assert (again.balance.spent_units, again.open_units) == (1_000, 1_000)
    assert again.rooms(ANN, now_ms=desks.now_ms) == {"agent: in all": 500}


class Forgetful(Purse):
    """Says yes and writes nothing down."""

    def reserve(
        self, deal: str, units: int, counterparty: str, *, now_ms: int, account: str = ""
    ) -> None:
        """Forget it."""


def test_money_that_the_purse_did_not_set_aside_is_never_locked() -> None:
    desks = Desks()
    desks.buying.reserve = Forgetful(Budget(total="1"), ASSET)
    ask = desks.ask()
    desks.until(lambda: ask.state is AskState.ENDED)
    assert "budget_exhausted" in [notice.kind for notice in desks.buyer.notices]
    assert desks.chain.held() == 0
    assert ask.outcome is not None
    assert (ask.outcome.state, ask.outcome.why) == (
        State.LAPSED,
        "the buyer did not lock in time",
    )


# ---- the purse and the market -------------------------------------------------------------------


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Market]:
    async with market(tmp_path) as running:
        yield running


def scribe(name: str = "scribe", *, fails: bool = False) -> Agent:
    agent = Agent(name)

    @agent.offers(
        "summarise", price=Price.per_task("0.02"), deliver_within=4, windows=SHORT, capacity=64
    )
    async def summarise(task: Summarise, job: Job) -> Summary:
        if fails:
            raise ValueError("no ideas today")
        return Summary(summary=task.text[:10])

    return agent


async def buy(buyer: Agent, number: int = 0, **wish: Any) -> int:
    task = Summarise(text=f"{TASK.text} {number}")
    bought = await buyer.purchase(
        "summarise", task, returns=Summary, max_price="0.05", decide_after_ms=100, **wish
    )
    return bought.paid_units


@pytest.mark.anyio
async def test_twenty_purchases_at_once_never_exceed_the_budget(place: Market) -> None:
    exposure = PRICE_UNITS + BOND_UNITS
    seller, buyer = scribe(), Agent("buyer", budget="0.11")
    await place.join(seller, buyer)
    purse = buyer.purse
    paid: list[int] = []
    short: list[BudgetExhausted] = []
    most = 0

    def watch(*_: object) -> None:
        nonlocal most
        most = max(most, purse.open_units + purse.balance.spent_units)

    place.node.runtime.observers.append(watch)

    async def one(number: int) -> None:
        try:
            paid.append(await buy(buyer, number))
        except BudgetExhausted as error:
            short.append(error)

    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(one, number)
    await place.rest()
    assert len(paid) == 5
    assert len(short) == 15
    assert {error.limit for error in short} == {"buyer: in all"}
    assert all(error.left_units < exposure for error in short)
    assert 5 * PRICE_UNITS <= most <= 110_000
    assert place.earned(buyer) == -sum(paid) == -100_000
    # The bonds were never needed, and what is left does not pay for one more deal.
    assert purse.balance.available_units == 10_000
    with pytest.raises(BudgetExhausted) as raised:
        await buy(buyer)
    assert (raised.value.left_units, raised.value.asked_units) == (10_000, exposure)


@pytest.mark.anyio
async def test_a_refund_gives_the_budget_back(place: Market) -> None:
    bad, good = scribe("bad", fails=True), scribe("good")
    buyer = Agent("buyer", budget=Budget(total="0.03", per_deal="0.022"))
    await place.join(bad, buyer)
    with pytest.raises(DealFailed):
        await buy(buyer)
    await place.rest()
    assert buyer.purse.balance.available_units == 30_000
    await place.join(good)
    assert await buy(buyer, blocked=[bad.address]) == PRICE_UNITS


@pytest.mark.anyio
async def test_a_limit_holds_across_a_restart_of_the_node(tmp_path: Path) -> None:
    async with market(tmp_path) as place:
        buyer = Agent("buyer", budget="0.05")
        await place.join(scribe(), buyer)
        assert [await buy(buyer, number) for number in range(2)] == [PRICE_UNITS] * 2
        await place.rest()
        before = buyer.purse.balance
        rows = {row.seller: row.good for row in buyer.buying.experience.book.rows()}  # type: ignore[union-attr]
    async with market(tmp_path) as place:
        again = Agent("buyer", budget="0.05")
        await place.join(scribe(), again)
        assert again.purse.balance == before
        assert before.spent_units == 2 * PRICE_UNITS
        with pytest.raises(BudgetExhausted) as raised:
            await buy(again, 3)
        assert (raised.value.limit, raised.value.left_units) == ("buyer: in all", 10_000)
        assert again.buying is not None
        kept = {row.seller: row.good for row in again.buying.experience.book.rows()}
        assert kept.keys() == rows.keys(), "what was learnt of sellers outlives the process too"


@pytest.mark.anyio
async def test_with_nothing_left_nothing_is_even_asked(place: Market) -> None:
    seller, buyer = scribe(), Agent("buyer", budget=Budget(per_day="0"))
    await place.join(seller, buyer)
    with pytest.raises(BudgetExhausted, match="per day") as raised:
        await buy(buyer)
    assert raised.value.left_units == 0
    assert buyer.buying is not None
    assert not buyer.buying.asks


@pytest.mark.anyio
async def test_a_seller_that_buys_inputs_has_a_purse_of_its_own(place: Market) -> None:
    editor, writer = Agent("editor", budget="0.021"), scribe("writer")

    @editor.offers("digest", price=Price.per_task("0.5"), deliver_within=5, windows=SHORT)
    async def digest(task: Summarise, job: Job) -> Summary:
        return await job.hire(
            "summarise", task, returns=Summary, max_price="0.05", decide_after_ms=100
        )

    buyer = Agent("buyer")
    await place.join(editor, writer, buyer)
    with pytest.raises(DealFailed):
        await buyer.purchase("digest", TASK, returns=Summary, max_price="1", decide_after_ms=100)
    await place.rest()
    assert editor.purse.balance.spent_units == 0
    assert place.earned(writer) == place.earned(editor) == place.earned(buyer) == 0
    assert not buyer.purse.limited
