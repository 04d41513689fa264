"""The buying half of a desk: what it does with decisions, whoever makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from coase.agents.asks import AskState, BuyerStrategy, Decision, DeclineAll, Verdict
from coase.agents.buyer import CLOSING_PAUSE_MS
from coase.agents.purse import Budget, Purse
from coase.agents.seller import OFFER_VALID_MS
from coase.protocol.errors import BudgetExhausted
from coase.protocol.states import State
from tests.agents.desks import ASSET, Market, kind_of

if TYPE_CHECKING:
    from coase.protocol.session import Thread


class Told(BuyerStrategy):
    """Takes the cheapest, and writes down what it is told."""

    def __init__(self, *, wake_ms: int | None = None) -> None:
        self.seen: list[str] = []
        self.looks: list[tuple[int, int]] = []
        self.wake_ms = wake_ms
        self.takes = True

    def decide(
        self, offers: list[Thread], *, closing: bool, opened_ms: int, now_ms: int
    ) -> list[Decision]:
        """Return an accept of the cheapest once it is time."""
        self.looks.append((now_ms, len(offers)))
        if not closing or not offers or not self.takes:
            return []
        best = min(offers, key=lambda thread: thread.agreed_terms.price_units)
        return [Decision(best.deal, Verdict.ACCEPT)]

    def undone(self, deal: str) -> None:
        """Write it down."""
        self.seen.append("undone")

    def agreed(self, thread: Thread) -> None:
        """Write it down."""
        self.seen.append("agreed")

    def ended(self, thread: Thread, *, now_ms: int) -> None:
        """Write it down."""
        self.seen.append(f"ended {thread.state}")

    def next_ms(self) -> int | None:
        """Return what the test wants."""
        return self.wake_ms


def test_a_strategy_is_told_what_became_of_its_decisions() -> None:
    market = Market(prices=(1_000, 900))
    ask = market.ask()
    ask.strategy = told = Told()
    market.until(lambda: ask.state is AskState.ENDED)
    assert told.seen == ["agreed", "ended rejected", "ended settled"]


def test_an_accept_that_the_purse_refuses_is_undone_and_the_next_best_is_taken() -> None:
    market = Market(prices=(900, 1_000))
    cheap = market.sellers[0].desk.me

    class Picky(Purse):
        def reserve(
            self, deal: str, units: int, counterparty: str, *, now_ms: int, account: str = ""
        ) -> None:
            if counterparty == cheap:
                raise BudgetExhausted(limit="whim", asked_units=units, left_units=0)
            super().reserve(deal, units, counterparty, now_ms=now_ms)

    market.buying.reserve = Picky(Budget(total="1"), ASSET)
    ask = market.ask()
    ask.strategy = told = Told()
    market.until(lambda: ask.state is AskState.ENDED)
    assert told.seen == ["undone", "ended rejected", "agreed", "ended settled"]
    assert ask.outcome is not None
    assert ask.outcome.agreed_terms.price_units == 1_000


def test_a_strategy_is_asked_again_when_it_wants_to_and_not_every_moment() -> None:
    market = Market()
    ask = market.ask()
    wake_ms = market.now_ms + 7_000
    ask.strategy = told = Told(wake_ms=wake_ms)
    told.takes = False
    market.pass_ms(6_000)
    looks = len(told.looks)
    assert looks <= 3
    market.pass_ms(1_250)
    assert len(told.looks) > looks
    told.wake_ms = None
    market.pass_ms(OFFER_VALID_MS)
    assert ask.state is AskState.ENDED
    assert ask.why == "no offer was acceptable"


def test_without_a_wish_it_is_asked_again_soon() -> None:
    market = Market()
    ask = market.ask()
    ask.strategy = told = Told()
    told.takes = False
    market.pass_ms(2_000)
    times = [at_ms for at_ms, _ in told.looks]
    assert len(times) >= 2_000 // CLOSING_PAUSE_MS - 1
    assert all(count for _, count in told.looks), "it is not bothered without an offer"


def test_what_nobody_bargains_for_any_more_is_declined() -> None:
    market = Market(prices=(1_000, 900))
    ask = market.ask()
    ask.strategy = DeclineAll()
    market.until(lambda: ask.state is AskState.ENDED)
    assert market.kinds().count("reject") == 2
    assert ask.outcome is None


def test_a_rejected_counter_offer_of_ours_is_withdrawn() -> None:
    market = Market()
    ask = market.ask(counters=1)
    market.lost = lambda to, wire: kind_of(wire) == "counter"
    market.until(lambda: "counter" in market.kinds())
    [thread] = market.buyer.desk.threads.values()
    assert thread.state is State.COUNTERED

    class No(Told):
        def decide(
            self, offers: list[Thread], *, closing: bool, opened_ms: int, now_ms: int
        ) -> list[Decision]:
            return [Decision(thread.deal, Verdict.REJECT, reason="too late")]

    ask.strategy = No(wake_ms=market.now_ms)
    market.until(lambda: ask.state is AskState.ENDED)
    assert "withdraw" in market.kinds()
    assert "reject" not in market.kinds()


@pytest.mark.parametrize("until_ms", [0, 700])
def test_an_accept_waits_as_long_as_the_strategy_says(until_ms: int) -> None:
    market = Market()
    ask = market.ask()

    class Brief(Told):
        def decide(
            self, offers: list[Thread], *, closing: bool, opened_ms: int, now_ms: int
        ) -> list[Decision]:
            at_ms = now_ms + until_ms if until_ms else 0
            return [Decision(t.deal, Verdict.ACCEPT, until_ms=at_ms) for t in offers]

    ask.strategy = Brief()
    market.lost = lambda to, wire: kind_of(wire) == "accept"
    market.until(lambda: ask.state is AskState.ACCEPTING)
    began_ms = market.now_ms
    market.until(lambda: ask.state is not AskState.ACCEPTING)
    waited_ms = market.now_ms - began_ms
    assert waited_ms <= 1_000 if until_ms else waited_ms >= 4_500
