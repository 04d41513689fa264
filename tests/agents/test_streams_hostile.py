"""Channels between sides that lie, and between honest ones in bad times."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from coase.agents.firm import new_firm
from coase.agents.means import Means
from coase.agents.ports import Codec
from coase.agents.seller import SellerDesk
from coase.agents.streams import LOCAL_DELAY_S, StreamPolicy
from coase.escrow.accounts import ViewTooOld
from coase.escrow.voucher import AskWithdrawal
from coase.protocol.states import State

from .desks import head_of, kind_of
from .test_streams import Streaming, over

if TYPE_CHECKING:
    from coase.agents.steps import OnChannel

    from .desks import Seat


@pytest.fixture
def market() -> Streaming:
    return Streaming()


class OldVouchers(Codec):
    """Says each time the first voucher that was ever signed."""

    first: dict[str, str] | None = None

    def encode(self, *, kind: str, plain: bytes, **rest: Any) -> bytes:
        """Return the envelope around another voucher."""
        if kind == "voucher":
            body = json.loads(plain)
            self.first = self.first or body
            plain = json.dumps({**self.first, "units": body["units"]}).encode()
        return super().encode(kind=kind, plain=plain, **rest)


def test_a_voucher_pays_once_whatever_is_said_of_it(market: Streaming) -> None:
    desk = market.buyer.desk
    desk.codec = OldVouchers(desk.codec.identity, net=desk.codec.net)
    market.buy()
    market.until(lambda: market.paid() > 0)
    market.pass_ms(10_000)
    thread = next(iter(market.seller.desk.threads.values()))
    assert thread.paid_units == market.paid() < market.signed()
    assert thread.owed_units > 0
    market.until(lambda: not market.seller.desk.threads, within_ms=300_000)
    (deal,) = [name for name, data in market.seller.closed if data]
    assert deal == thread.deal
    assert market.paid() == thread.paid_units


def test_vouchers_of_two_deals_that_overtake_each_other_pay_both(market: Streaming) -> None:
    first = market.buy()
    market.until(lambda: over(first))
    before = market.paid()
    lost: dict[str, int] = {}

    def lose(to: str, wire: bytes) -> bool:
        """Lose each voucher of one of the two deals twice, so that others come before it."""
        if kind_of(wire) != "voucher":
            return False
        head = head_of(wire)
        slow = next(iter(market.seller.desk.threads), "")
        lost[head["id"]] = lost.get(head["id"], 0) + 1
        return head["deal"] == slow and lost[head["id"]] < 3

    market.lost = lose
    asks = [market.buy(), market.buy()]
    market.until(lambda: all(over(ask) for ask in asks))
    assert max(lost.values()) > 2
    paid = 0
    for ask in asks:
        assert ask.outcome is not None
        assert (ask.outcome.state, ask.outcome.verdict) == (State.SETTLED, "good")
        paid += ask.outcome.view.to_seller_units
    assert market.paid() == market.signed() == before + paid


def test_a_deposit_that_is_not_seen_yet_is_not_made_twice(
    market: Streaming, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[OnChannel] = []
    fund = market._fund

    def counted(seat: Seat, effect: OnChannel) -> None:
        made.append(effect)
        fund(seat, effect)

    monkeypatch.setattr(market, "_fund", counted)
    asks = [market.buy() for _ in range(3)]
    market.until(lambda: all(over(ask) for ask in asks))
    assert {ask.outcome.state for ask in asks if ask.outcome} == {State.SETTLED}
    assert len(made) == len(market.funded) == 1


def test_a_deal_ends_with_the_channel_that_pays_it(market: Streaming) -> None:
    ask = market.buy()
    market.until(lambda: market.paid() > 0)
    end = next(iter(market.buyer.desk.streams.lines.values())).buyer
    assert end is not None
    market.ledger.execute(AskWithdrawal(market.config(), 100), market.buyer.desk.me)
    market.buyer.desk.streams.want(end.channel_id)
    market.writes = False
    market.pass_ms(1_500)
    market.writes = True
    market.until(lambda: over(ask), within_ms=5_000)
    assert ask.outcome is not None
    assert "a withdrawal is pending" in ask.outcome.why
    assert market.paid() == market.signed() == ask.outcome.view.to_seller_units
    assert not market.seller.desk.threads


def test_a_deposit_is_no_more_than_the_buyer_has_and_leaves_it_something(
    market: Streaming,
) -> None:
    me, buying = market.buyer.desk.me, market.buying
    buying.means = Means(buying.under_way, name="buyer")
    market.ledger.balances[me] = 3_000  # The price at most is a thousand.
    spent = 0
    for _ in range(3):
        buying.know(market.ledger.balances[me])
        ask = market.buy()
        market.until(lambda ask=ask: over(ask))  # type: ignore[misc]
        assert ask.outcome is not None
        assert (ask.outcome.method, ask.outcome.state) == ("channel", State.SETTLED)
        spent += ask.outcome.view.to_seller_units
    assert market.signed() == spent
    assert market.ledger.balances[me] > 0


def test_a_seller_who_has_not_seen_the_chain_for_long_delivers_nothing_more(
    market: Streaming, monkeypatch: pytest.MonkeyPatch
) -> None:
    market.buy()
    market.until(lambda: market.paid() > 0)
    market.writes = False
    monkeypatch.setattr(market, "block", lambda: None)  # Its endpoint is away.
    market.now_ms += (LOCAL_DELAY_S // 3 + 2) * 1_000
    (thread,) = market.seller.desk.threads.values()
    with pytest.raises(ViewTooOld):
        market.seller.desk.chunk(
            thread.deal, "x", tokens=1, due_units=thread.due_units + 1, now_ms=market.now_ms
        )
    assert not market.seller.desk.streams.can_send(thread, 1, now_ms=market.now_ms)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_chunk_that_costs_nothing_is_answered_for_after_a_restart(
    market: Streaming, restarted: bool
) -> None:
    firm = new_firm("home")
    market.buying.firm = lambda: firm
    seller = market.seller.desk.seller
    assert isinstance(seller, SellerDesk)
    seller.firm = lambda: firm
    ask = market.buy(settlements=("none",))
    market.writes = False
    market.until(lambda: any(t.task for t in market.seller.desk.threads.values()))
    market.lost = lambda to, wire: kind_of(wire) == "ack"
    market.until(lambda: ask.chosen)
    deal = ask.chosen
    step = market.seller.desk.chunk(deal, "a part", tokens=1, due_units=0, now_ms=market.now_ms)
    market.perform(market.seller, step)
    market.deliver()
    assert market.buyer.desk.threads[deal].shown == "a part"
    if restarted:
        market.restart(market.buyer)
    market.lost = lambda to, wire: False
    market.until(lambda: len(market.seller.desk._outbox) == 0, within_ms=20_000)
    assert deal in market.seller.desk.threads


def owed(market: Streaming) -> int:
    """Return what the buyer owes in all of its channels."""
    ends = [line.seller for line in market.seller.desk.streams.lines.values()]
    return sum(end.exposed_units for end in ends if end is not None)


def test_who_has_paid_before_may_owe_no_more_in_many_deals_than_in_one(
    market: Streaming,
) -> None:
    ask = market.buy()
    market.until(lambda: over(ask))
    streams, buyer = market.seller.desk.streams, market.buyer.desk.me
    streams.policy = replace(streams.policy, chunk_max_units=10)
    trusted = market.paid() // streams.policy.paid_share
    assert trusted > 40
    assert streams.trusted_units(buyer) == trusted
    assert streams._policy(buyer).exposure_max_units == trusted
    asked = streams.policy
    streams.policy = StreamPolicy.of(market.seller.desk.asset)
    market.lost = lambda to, wire: kind_of(wire) == "voucher"
    market.buy()
    market.until(lambda: owed(market) > 0)
    streams.policy = asked
    assert streams.trusted_units(buyer) == trusted - owed(market)
    stranger = streams._policy("0x" + "99" * 20)
    assert (stranger.chunk_max_units, stranger.exposure_max_units) == (10, 10)


def bought_or_not(market: Streaming) -> None:
    ask = market.buy(settlements=("channel",))
    market.until(lambda: ask.outcome is not None or bool(ask.why))


def test_who_never_pays_gets_one_chunk_worth_in_all_his_channels(market: Streaming) -> None:
    market.lost = lambda to, wire: kind_of(wire) == "voucher"
    limit = 400  # A first chunk with the longest input is 328, what he takes each time less.
    streams, buyer = market.seller.desk.streams, market.buyer.desk.me
    streams.policy = replace(streams.policy, chunk_max_units=limit)
    for _ in range(6):
        bought_or_not(market)
        for line in market.buyer.desk.streams.lines.values():  # He takes another channel each time.
            if line.buyer is not None and not line.buyer.stopped:
                market.buyer.desk.streams._pass_over(line.buyer.channel_id, market.seller.desk.me)
    assert 0 < owed(market) <= limit
    assert "offer" not in market.kinds()[-3:]  # In the end he is made none.
    assert streams.trusted_units(buyer) == limit - owed(market)
