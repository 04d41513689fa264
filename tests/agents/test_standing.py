"""Rate contracts: what is called for under them is paid once, whatever is lost, killed or lied."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from coase.agents.asks import Wish
from coase.agents.metering import call_units, count_input, stream_units
from coase.agents.ports import Codec
from coase.agents.purse import Budget, Purse
from coase.agents.standing import CALL_REFUSED, CONTRACT_S
from coase.agents.streams import Streams
from coase.protocol.calls import call_id
from coase.protocol.errors import BudgetExhausted, LocalProtocolError
from coase.protocol.identity import Identity, keccak256
from coase.protocol.states import State

from .desks import ASSET, CAPABILITY, SCHEMAS, kind_of
from .test_streams import WORDS, Streaming, over, task

if TYPE_CHECKING:
    from coase.agents.asks import Ask
    from coase.protocol.session import Thread

    from .desks import Seat

LIMITS = {"input_max": 100, "output_max": 400}


class Standing(Streaming):
    """A market in which the buyer has bought before, and has agreed on rates since."""

    def __init__(self) -> None:
        super().__init__()
        first = self.buy()
        self.until(lambda: over(first))
        self.sent.clear()
        self.rates = self.agree()

    def agree(self, **more: Any) -> Ask:
        """Let both agree on rates."""
        limits = {**LIMITS, **more}
        ask = self.ask("", settlements=("channel", "escrow"), **limits)  # type: ignore[arg-type]
        self.until(lambda: ask.chosen and ask.state == "bound")
        return ask

    @property
    def contract(self) -> Thread:
        return self.buyer.desk.threads[self.rates.chosen]

    def restart(self, seat: Seat, **options: Any) -> Seat:
        """Return the same agent, born again; its rates it withdraws from, as a node has it do."""
        again = super().restart(seat, **options)
        again.desk.abandoned = [thread.deal for thread in again.desk.contracts()]
        return again

    def call(self, text: str = "write", **more: Any) -> Ask:
        """Order work under the rates."""
        wish = Wish(CAPABILITY, SCHEMAS, text, **{**LIMITS, "kept": True, **more})
        ask, step = self.buying.call(self.contract, wish, now_ms=self.now_ms)
        self.perform(self.buyer, step)
        return ask


@pytest.fixture
def market() -> Standing:
    return Standing()


def test_a_call_is_answered_with_the_first_of_the_text(market: Standing) -> None:
    market.sent.clear()
    ask = market.call()
    market.deliver()
    market.write(ask.chosen)
    assert market.kinds()[:3] == ["call", "chunk", "voucher"]
    market.until(lambda: over(ask))
    assert ask.outcome is not None
    assert ask.outcome.state is State.SETTLED
    terms = ask.outcome.agreed_terms
    assert ask.outcome.view.to_seller_units == stream_units(
        terms, count_input(task("write")), WORDS
    )
    assert terms.price_units == call_units(market.contract.agreed_terms, **LIMITS)
    assert not set(market.kinds()) & {"request", "offer", "accept", "agreed"}


def test_what_many_calls_cost_is_paid_once_and_to_the_unit(market: Standing) -> None:
    before = market.paid()
    asks = [market.call() for _ in range(4)]
    market.until(lambda: all(map(over, asks)))
    assert {ask.outcome.state for ask in asks if ask.outcome} == {State.SETTLED}
    spent = sum(ask.outcome.view.to_seller_units for ask in asks if ask.outcome)
    assert market.paid() == market.signed() == before + spent
    assert len({ask.chosen for ask in asks}) == 4
    assert asks[0].chosen == call_id(market.contract.deal, 1)


def test_rates_hold_no_place_and_no_money_and_end_in_silence(market: Standing) -> None:
    seller, buyer = market.seller.desk, market.buyer.desk
    assert [thread.deal for thread in seller.contracts()] == [market.rates.chosen]
    assert not seller.bound()
    assert not buyer.bound()
    assert not any(seller.working.values())
    assert not market.buying.is_spending()
    purse = market.buying.reserve = Purse(Budget.of("1"), ASSET)
    purse.recall(buyer.threads.values(), [])
    assert purse.open_units == 0
    market.pass_ms((CONTRACT_S + 2) * 1_000, pause_ms=1_000)
    assert not seller.contracts()
    assert not buyer.contracts()
    assert market.rates.outcome is not None
    assert market.rates.outcome.state is State.LAPSED
    assert market.rates.outcome.why == "its time is over"
    assert purse.balance.spent_units == 0


def test_a_call_is_set_aside_in_the_purse_and_refused_beyond_it(market: Standing) -> None:
    units = call_units(market.contract.agreed_terms, **LIMITS)
    limit = f"0.{2 * units - 1:0{ASSET.decimals}d}"
    purse = market.buying.reserve = Purse(Budget.of(limit), ASSET)
    ask = market.call()
    assert purse.held() == {ask.chosen: units}
    with pytest.raises(BudgetExhausted):
        market.call()
    market.until(lambda: over(ask))
    assert purse.balance.spent_units == ask.outcome.view.to_seller_units  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["call", "chunk", "voucher", "result", "ack", "settle"])
@pytest.mark.parametrize("every", [2, 3])
def test_what_is_lost_is_said_again_and_paid_once(market: Standing, kind: str, every: int) -> None:
    before = market.paid()
    market.lose(kind, every=every)
    ask = market.call()
    market.until(lambda: over(ask))
    assert ask.outcome is not None
    assert ask.outcome.state is State.SETTLED
    assert market.paid() == market.signed() == before + ask.outcome.view.to_seller_units


@pytest.mark.parametrize("who", ["seller", "buyer", "both"])
@pytest.mark.parametrize("chunks", [0, 1, 3, 6])
def test_killed_in_mid_call_it_goes_on_from_what_was_paid(
    market: Standing, who: str, chunks: int
) -> None:
    before = market.paid()
    ask = market.call()
    market.until(lambda: market.kinds().count("chunk") >= chunks)
    market.kill(who)
    market.until(lambda: not market.buyer.desk.threads and not market.seller.desk.threads)
    summaries = {deal: json.loads(data) for deal, data in market.buyer.closed if data}
    row = summaries[ask.chosen]
    assert (row["state"], row["contract"]) in {
        ("settled", market.rates.chosen),
        # It was never begun: who sells has forgotten the rates before it heard of the call.
        ("refunded", market.rates.chosen),
    }
    assert row["state"] == "settled" or (chunks == 0 and who != "buyer")
    assert market.paid() == market.signed() == before + row["to_seller_units"]


def refused(market: Standing, ask: Ask, reason: str) -> None:
    """Check that a call came to nothing, and cost nothing."""
    before = market.paid()
    market.until(lambda: over(ask))
    assert ask.outcome is not None
    assert ask.outcome.state is State.REFUNDED
    assert f"{CALL_REFUSED}: {reason}" in ask.outcome.why
    assert market.paid() == market.signed() == before
    market.pass_ms(1_000)
    assert not market.seller.desk.bound()


def test_who_is_full_refuses_a_call_and_the_rates_stand(market: Standing) -> None:
    ware = market.seller.desk.seller.wares[CAPABILITY]  # type: ignore[union-attr]
    market.seller.desk.seller.wares[CAPABILITY] = replace(ware, capacity=0)  # type: ignore[union-attr]
    refused(market, market.call(), "capacity")
    market.seller.desk.seller.wares[CAPABILITY] = ware  # type: ignore[union-attr]
    ask = market.call()
    market.until(lambda: over(ask))
    assert ask.outcome is not None
    assert ask.outcome.state is State.SETTLED


def test_rates_that_a_seller_has_forgotten_bind_nobody(market: Standing) -> None:
    forgotten = market.rates.chosen
    records = [record for record in market.seller.records if record.deal != forgotten]
    again = market.restart(market.seller, records=records)
    again.desk.seller = market.wares(again)
    refused(market, market.call(), "unknown_deal")


def test_a_task_larger_than_what_is_paid_for_is_refused(market: Standing) -> None:
    refused(market, market.call("x" * 5_000, input_max=3), "wrong_terms")


def test_a_price_that_does_not_cover_the_call_is_refused(
    market: Standing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coase.agents.buyer.call_units", lambda *_, **__: 1)
    refused(market, market.call(), "wrong_terms")


def test_a_number_is_called_once(market: Standing) -> None:
    ask = market.call()
    market.until(lambda: over(ask))
    market.buyer.desk.standing._last.clear()
    refused(market, market.call("another"), "wrong_state")


def test_nobody_else_calls_under_our_rates(market: Standing) -> None:
    lost: list[bytes] = []

    def lose(to: str, wire: bytes) -> bool:
        if kind_of(wire) == "call":
            lost.append(wire)
        return bool(lost)

    market.lost = lose
    market.call()
    told = json.loads(market.buyer.records[-1].data)["plain"]
    stranger = Codec(Identity(keccak256(b"stranger")), net="t")
    seller, contract = market.seller.desk, market.contract
    wire = stranger.encode(
        kind="call",
        message_id="ab" * 16,
        to=seller.me,
        deal=call_id(contract.deal, 1),
        re=contract.deal,
        sent_ms=market.now_ms,
        expires_ms=market.now_ms + 1_000,
        plain=told.encode(),
        key=contract.their_key,
    )
    market.perform(market.seller, seller.hear(wire, now_ms=market.now_ms))
    assert seller.counts["refused_unknown_deal"] == 1
    assert not seller.bound()
    market.perform(market.seller, seller.hear(lost[0], now_ms=market.now_ms))
    assert seller.bound()


@pytest.mark.parametrize(
    "limits",
    [{"input_max": 101}, {"output_max": 401}],
)
def test_what_the_rates_do_not_allow_is_not_called(
    market: Standing, limits: dict[str, int]
) -> None:
    with pytest.raises(LocalProtocolError):
        market.call(**limits)  # type: ignore[arg-type]
    with pytest.raises(LocalProtocolError, match="too large"):
        market.call("x" * 50_000)


def test_a_call_whose_channel_does_not_hold_its_price_holds_no_place(
    market: Standing, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = market.buyer.desk.streams.task_fields

    def elsewhere(thread: Thread) -> dict[str, object]:
        return {**fields(thread), "channel_salt": "0x" + "77" * 32}

    monkeypatch.setattr(Streams, "task_fields", lambda _, thread: elsewhere(thread))
    refused(market, market.call(), "funds")


def test_a_call_cannot_be_left_waiting_for_longer_than_it_takes_to_begin(
    market: Standing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coase.agents.buyer.lock_within_s", lambda _: CONTRACT_S)
    refused(market, market.call(), "wrong_terms")


def test_who_has_begun_a_call_cannot_refuse_it_any_more(market: Standing) -> None:
    ask = market.call()
    market.until(lambda: market.buyer.desk.threads[ask.chosen].chunks)
    desk, thread = market.seller.desk, market.buyer.desk.threads[ask.chosen]
    body = {"reason": "capacity", "detail": "", "now_ms": market.now_ms}
    wire = desk.codec.encode(
        kind="nack",
        message_id="cd" * 16,
        to=market.buyer.desk.me,
        deal=thread.deal,
        re=thread.task_id,
        sent_ms=market.now_ms,
        expires_ms=market.now_ms + 1_000,
        plain=json.dumps(body).encode(),
        key="",
    )
    market.perform(market.buyer, market.buyer.desk.hear(wire, now_ms=market.now_ms))
    market.until(lambda: over(ask))
    assert ask.outcome is not None
    assert ask.outcome.state is State.SETTLED


def test_a_stranger_gets_no_rates() -> None:
    market = Streaming()
    ask = market.ask("", settlements=("channel", "escrow"), **LIMITS)  # type: ignore[arg-type]
    market.pass_ms(6_000)
    assert not ask.chosen
    assert not market.seller.desk.contracts()


def test_rates_of_an_earlier_life_are_not_called_under(market: Standing) -> None:
    contract = market.rates.chosen
    again = market.restart(market.seller)
    again.desk.seller = market.wares(again)
    assert again.desk.abandoned == [contract]
    refused(market, market.call(), "unknown_deal")


def test_on_a_slow_chain_a_call_may_begin_later(market: Standing) -> None:
    for seat in (market.buyer, market.seller):
        seat.desk.margins = replace(seat.desk.margins, chain_s=60)
    ask = market.call()
    thread = market.buyer.desk.threads[ask.chosen]
    assert thread.agreed_terms.lock_by_s > market.now_ms // 1_000 + 2 * 60
    market.until(lambda: over(ask))
    assert ask.outcome is not None
    assert ask.outcome.state is State.SETTLED


def test_channels_under_rates_are_read_before_a_call_needs_it(market: Standing) -> None:
    streams = market.seller.desk.streams
    market.claim()
    streams.want(next(iter(streams.lines)))
    market.pass_ms(2_000)
    assert not streams.claimable()
    market.pass_ms(200_000, pause_ms=1_000)
    channel = next(iter(market.seller.desk.streams.lines.values())).seller
    assert channel is not None
    assert channel.view is not None
    assert market.now_ms // 1_000 - channel.view.time_s < 160
    market.pass_ms((CONTRACT_S + 200) * 1_000, pause_ms=1_000)
    channel = next(iter(market.seller.desk.streams.lines.values())).seller
    assert channel is not None
    assert channel.view is not None
    assert market.now_ms // 1_000 - channel.view.time_s > 200  # Nobody asks for it now.


def test_rates_fill_a_channel_again_before_anything_more_was_signed(
    market: Standing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coase.agents.streams.CALLS_AHEAD", 25)
    monkeypatch.setattr("coase.agents.streams.DEPOSIT_DEALS", 1)
    market.writes = False
    price = market.contract.agreed_terms.price_units
    for _ in range(2):
        market.pass_ms(4_000)
        assert market.buyer.desk.streams.ready_units(market.contract) == 25 * price
        market.call()


def test_an_escrow_takes_no_rates(market: Standing) -> None:
    market.seller.desk.streams.enabled = False
    ask = market.ask("", settlements=("channel", "escrow"), **LIMITS)  # type: ignore[arg-type]
    market.pass_ms(6_000)
    assert not ask.chosen
    assert ask.why == "nobody made an offer"
