"""Bargains between real strategies over real desks, and what comes of experience."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from coase.agents.asks import Ask, AskState, Decision, Verdict, Wish
from coase.agents.bargain import BuyerBargain, SellerBargain, Style, proposal_of, strategy_of
from coase.agents.buyer import counter_terms
from coase.agents.experience import Experience
from coase.agents.purse import Budget, Purse
from coase.agents.seller import SellerDesk, Ware
from coase.negotiation.pricing import Price
from coase.negotiation.scores import Outcome
from coase.protocol.errors import ConfigurationError
from coase.protocol.states import State
from tests.agents.desks import ASSET, CAPABILITY, SCHEMA, SCHEMAS, Market, head_of, kind_of

if TYPE_CHECKING:
    from coase.protocol.messages import Request
    from coase.protocol.session import Thread


def bargainers(*prices: str, style: Style = "linear", floor: int = 500, **more: Any) -> Market:
    """Return a market whose sellers ask these prices and come down to a part of them."""
    market = Market(prices=(1,) * len(prices))
    for seat, price in zip(market.sellers, prices, strict=True):
        strategy = SellerBargain(
            Price.per_task(price, floor_permille=floor),
            ASSET,
            deliver_within_s=30,
            style=style,
            by_rounds=True,
            **more,
        )
        seat.desk.seller = seller = SellerDesk(seat.desk, agent=seat.name)
        seller.sell(Ware("echo", SCHEMA, SCHEMA, strategy))
    return market


def ask(
    market: Market,
    task: str = "hello",
    *,
    wish: dict[str, Any] | None = None,
    by_rounds: bool = True,
    max_price_units: int = 3_000,
    **bargain: Any,
) -> Ask:
    """Let the buyer ask for something, and bargain for it."""
    wanted = Wish(CAPABILITY, SCHEMAS, task, **{"bids_max": len(market.sellers), **(wish or {})})
    strategy = BuyerBargain(
        max_price_units=max_price_units,
        deliver_within_s=60,
        by_rounds=by_rounds,
        salt=b"salt",
        purse=market.buying.reserve,
        experience=market.buying.experience,
        **bargain,
    )
    made, step = market.buying.ask(wanted, strategy, now_ms=market.now_ms)
    market.perform(market.buyer, step)
    return made


def bought(market: Market, made: Ask) -> Thread:
    market.until(lambda: made.state is AskState.ENDED)
    assert made.outcome is not None, made.why
    assert made.outcome.state is State.SETTLED
    return made.outcome


def name_of(market: Market, thread: Thread) -> str:
    return market.seats[thread.counterparty].name


# ---- buyers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["boulware", "linear", "conceder", "reciprocal"])
def test_two_who_bargain_meet_below_the_list_and_within_both_limits(style: Style) -> None:
    market = bargainers("0.002", "0.0022", "0.0024", style=style)
    made = ask(market, style=style, rounds=4)
    thread = bought(market, made)
    assert 1_000 <= thread.agreed_terms.price_units < 2_000
    assert "counter" in market.kinds()
    assert market.chain.held() == 0


def test_whoever_is_not_bargained_with_waits_until_somebody_has_agreed() -> None:
    market = bargainers("0.002", "0.0021", "0.0022", "0.0023")
    made = ask(market, shortlist=2, rounds=4)
    market.until(lambda: "accept" in market.kinds())
    countered = {to for kind, to, _ in market.sent if kind == "counter"}
    assert len(countered) == 2
    assert not {"withdraw", "reject"} & set(market.kinds()[: market.kinds().index("accept")])
    bought(market, made)
    assert market.kinds().count("reject") + market.kinds().count("withdraw") >= 2


def test_the_same_offers_in_another_order_make_the_same_deal() -> None:
    deals = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        market = bargainers("0.002", "0.0019", "0.0021", style="conceder")
        market.sellers = [market.sellers[index] for index in order]
        thread = bought(market, ask(market, rounds=4))
        deals.append((name_of(market, thread), thread.agreed_terms.price_units, thread.rounds))
    assert deals[0] == deals[1] == deals[2]


def test_one_that_does_not_answer_a_counter_offer_does_not_keep_the_others() -> None:
    market = bargainers("0.002", "0.0021")
    mute = market.sellers[0].desk.me
    market.lost = lambda to, wire: to == mute and kind_of(wire) == "counter"
    thread = bought(market, ask(market, rounds=4))
    assert name_of(market, thread) == "seller1"


def test_no_offer_within_the_highest_price_is_no_deal_and_tells_no_limit() -> None:
    market = bargainers("0.002", floor=1_000)
    made = ask(market, max_price_units=1_234, rounds=2)
    market.until(lambda: made.state is AskState.ENDED)
    assert made.outcome is None
    assert made.unpaid is None
    assert made.why == "no offer was acceptable"
    said = [wire for kind, _, wire in market.sent if kind in ("counter", "reject", "withdraw")]
    assert said
    assert not any(b"1234" in wire for wire in said)


def test_a_counter_offer_stays_within_the_purse_with_its_bond() -> None:
    market = bargainers("0.002")
    market.buying.reserve = Purse(Budget(per_deal="0.0015"), ASSET)
    thread = bought(market, ask(market, rounds=4))
    assert thread.agreed_terms.price_units <= 1_500
    assert market.buying.reserve.balance.spent_units == thread.agreed_terms.price_units


def test_what_the_purse_does_not_cover_is_told_with_the_limit_and_to_nobody_else() -> None:
    market = bargainers("0.002", floor=1_000)
    market.buying.reserve = Purse(Budget(per_deal="0.0015"), ASSET)
    made = ask(market, rounds=2, hope_permille=1_000)
    market.until(lambda: made.state is AskState.ENDED)
    assert made.unpaid is not None
    assert (made.unpaid.limit, made.unpaid.left_units) == ("agent: per deal", 1_500)
    assert "accept" not in market.kinds()
    assert not any(b"per deal" in wire for _, _, wire in market.sent)


def test_a_seller_that_walks_away_from_what_the_purse_covers_is_the_purses_doing() -> None:
    market = bargainers("0.002", style="fixed", floor=1_000)
    market.buying.reserve = Purse(Budget(per_deal="0.0015"), ASSET)
    made = ask(market, rounds=3)
    market.until(lambda: made.state is AskState.ENDED)
    assert "counter" in market.kinds()
    assert made.unpaid is not None
    assert made.unpaid.asked_units == 2_000


def test_an_offer_that_no_proposal_can_hold_is_turned_away() -> None:
    market = Market()
    made = ask(market)
    market.deliver()
    thread = market.buyer.desk.threads[made.offers[0]]
    bargain = made.strategy
    huge = 31 * 24 * 3600

    late = counter_terms(thread.agreed_terms, Decision("", Verdict.COUNTER, 900, huge))

    odd = replace(thread, terms=late, proposal_id="f" * 32)
    decisions = BuyerBargain(max_price_units=3_000, deliver_within_s=60).decide(
        [odd], closing=True, opened_ms=market.now_ms, now_ms=market.now_ms
    )
    assert [d.verdict for d in decisions] == [Verdict.REJECT]
    assert isinstance(bargain, BuyerBargain)


def test_a_counter_offer_says_all_that_is_negotiated() -> None:
    market = bargainers("0.002")
    made = ask(market)
    market.deliver()
    terms = market.buyer.desk.threads[made.offers[0]].agreed_terms
    theirs = proposal_of(terms)

    mine = replace(theirs, price_units=1_500, quality=70, verification="none", output_price_units=3)
    said = counter_terms(terms, Decision("", Verdict.COUNTER, proposal=mine))
    assert proposal_of(said) == mine
    assert said.default_to_seller_units == 750


# ---- experience ----------------------------------------------------------------------------------


def test_a_seller_silent_after_an_accept_rests_and_the_next_best_gets_the_deal() -> None:
    market = Market(prices=(900, 1_000))
    cheap = market.sellers[0].desk.me
    market.lost = lambda to, wire: kind_of(wire) == "agreed" and head_of(wire)["sender"] == cheap
    first = ask(market, hope_permille=1_000, by_rounds=False)
    assert name_of(market, bought(market, first)) == "seller1"
    book = market.buying.experience.book
    assert book.rests_until_ms(cheap, CAPABILITY) > 0
    assert book.failure_permille(cheap, CAPABILITY, now_ms=market.now_ms) > 400
    market.lost = lambda to, wire: False
    second = ask(market, "again", hope_permille=1_000, by_rounds=False)
    assert name_of(market, bought(market, second)) == "seller1"
    other = book.failure_permille(cheap, "other-00000000", now_ms=market.now_ms)
    assert other == 50, "what went wrong in one capability says nothing of another"


def test_by_rounds_experience_is_gathered_but_does_not_count() -> None:
    market = Market(prices=(900, 1_000))
    cheap = market.sellers[0].desk.me
    market.buying.experience.mark(cheap, CAPABILITY, Outcome.UNDELIVERED, now_ms=market.now_ms)
    thread = bought(market, ask(market, hope_permille=1_000))
    assert name_of(market, thread) == "seller0"
    [row] = market.buying.experience.book.rows()
    assert row.good > 0


def test_a_seller_that_refuses_the_accept_is_marked_a_little() -> None:
    market = Market(prices=(900, 1_000))
    full = market.sellers[0].desk
    made = ask(market, hope_permille=1_000, by_rounds=False, wish={"bids_max": 5})
    market.deliver()
    assert isinstance(full.seller, SellerDesk)
    full.seller.wares.clear()
    assert name_of(market, bought(market, made)) == "seller1"
    rows = {row.seller: row for row in market.buying.experience.book.rows()}
    assert 0 < rows[full.me].bad <= 100_000
    assert rows[full.me].silences == 0


@pytest.mark.parametrize("works", [True, False])
def test_what_was_delivered_and_what_was_not_is_remembered_after_a_restart(works: bool) -> None:
    market = Market(prices=(900,))
    market.works = works
    made = ask(market, hope_permille=1_000, by_rounds=False)
    market.until(lambda: made.state is AskState.ENDED)
    [row] = market.buying.experience.book.rows()
    assert (row.good > 0, row.bad > 0) == (works, not works)
    again = Experience()
    again.recall(json.loads(data) for _, data in market.buyer.closed if data)
    [kept] = again.book.rows()
    assert (kept.seller, kept.good, kept.bad) == (row.seller, row.good, row.bad)


# ---- sellers -------------------------------------------------------------------------------------


def request_with(market: Market, **changes: object) -> Request:
    made = ask(market)
    return made.request.model_copy(update=changes)


def quote_for(request: Request, **more: Any) -> object:
    seller = SellerBargain(Price.per_task("0.002"), ASSET, deliver_within_s=30, **more)
    return seller.quote(request, "0x" + "b0" * 20, load=0, now_ms=0)


def test_a_seller_promises_only_what_both_sides_allow() -> None:
    market = Market()
    assert quote_for(request_with(market, verifications=["replay"])) is None
    assert quote_for(request_with(market, quality_min=51), quality=50) is None
    only = quote_for(request_with(market, verifications=["hash", "none"]))
    assert getattr(only, "verification", "") == "none"
    both = quote_for(request_with(market, verifications=["none", "schema"]))
    assert getattr(both, "verification", "") == "schema"


def test_a_seller_does_not_sell_below_its_floor_however_it_is_asked() -> None:
    market = bargainers("0.002", floor=900, style="conceder")
    made = ask(market, max_price_units=1_700, rounds=6)
    market.until(lambda: made.state is AskState.ENDED)
    assert made.outcome is None
    assert "counter" in market.kinds()
    assert "accept" not in market.kinds()


def test_metered_work_is_bargained_with_its_rates_in_proportion() -> None:
    market = Market(prices=(1,))
    seat = market.sellers[0]
    strategy = SellerBargain(
        Price.per_million(input="2", output="8", floor_permille=500),
        ASSET,
        deliver_within_s=30,
        style="conceder",
        by_rounds=True,
    )
    seat.desk.seller = seller = SellerDesk(seat.desk, agent=seat.name)
    seller.sell(Ware("echo", SCHEMA, SCHEMA, strategy))
    made = ask(market, wish={"input_max": 500, "output_max": 100}, rounds=4)
    thread = bought(market, made)
    terms = thread.agreed_terms
    assert 900 <= terms.price_units < 1_800
    assert terms.work.pricing == "tokens"
    assert terms.work.output_price_units * 1_800 >= 8_000_000 * terms.price_units
    assert terms.work.output_price_units < 8_000_000


def test_no_strategy_has_an_unknown_name() -> None:
    with pytest.raises(ConfigurationError, match="no strategy"):
        BuyerBargain(max_price_units=1, deliver_within_s=1, style="hard")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no strategy"):
        strategy_of("hard", None)  # type: ignore[arg-type]
