"""The door for strangers, and the deals that go on behind it while it is stormed."""

from __future__ import annotations

import json
from typing import Any

from coase.agents.admission import ADDRESSES_MAX, Admission
from coase.agents.asks import AskState
from coase.agents.ports import Codec
from coase.protocol.identity import Identity, keccak256
from coase.protocol.messages import thread_id
from coase.protocol.states import State
from tests.agents.desks import Market, Seat, head_of

NOW = 1_700_000_000_000
ANN, EVE = "0x" + "0a" * 20, "0x" + "0e" * 20


def test_an_address_has_a_burst_and_then_a_rate() -> None:
    door = Admission(per_s=1_000, burst=1_000, address_per_s=10, address_burst=5)
    admitted = 0
    for _ in range(20):
        if door.admit(EVE, now_ms=NOW):
            door.verified(EVE, now_ms=NOW)
            admitted += 1
    assert admitted == 5
    assert door.admit(ANN, now_ms=NOW)
    assert not door.admit(EVE, now_ms=NOW + 99)
    assert door.admit(EVE, now_ms=NOW + 200)


def test_forgeries_in_anothers_name_cost_that_other_nothing() -> None:
    door = Admission(per_s=1_000, burst=1_000, address_per_s=1, address_burst=1)
    for _ in range(500):
        assert door.admit(ANN, now_ms=NOW)  # Looked at, and found to be no signature of hers.
    assert door.admit(ANN, now_ms=NOW)


def test_all_strangers_together_have_a_limit() -> None:
    door = Admission(per_s=10, burst=50)
    admitted = sum(door.admit(f"0x{n:040x}", now_ms=NOW) for n in range(100))
    assert admitted == 50
    assert not door.admit(ANN, now_ms=NOW + 90)
    assert door.admit(ANN, now_ms=NOW + 200)


def test_a_clock_that_goes_back_fills_no_bucket() -> None:
    door = Admission(per_s=10, burst=1)
    assert door.admit(ANN, now_ms=NOW)
    assert not door.admit(ANN, now_ms=NOW - 10_000)


def test_addresses_are_forgotten_when_there_are_too_many() -> None:
    door = Admission(address_per_s=1, address_burst=1)
    for n in range(ADDRESSES_MAX + 50):
        door.verified(f"0x{n:040x}", now_ms=NOW)
    assert len(door._by_address) == ADDRESSES_MAX
    assert not door.admit(f"0x{ADDRESSES_MAX:040x}", now_ms=NOW)


# ---- at a desk -------------------------------------------------------------------------------


def stranger(name: str) -> Codec:
    return Codec(Identity(keccak256(name.encode())), net="t")


def request(market: Market, codec: Codec, number: int) -> bytes:
    """A request like the buyer's, from somebody else."""
    body = head_of(next(wire for kind, _, wire in market.sent if kind == "request"))["body"]
    plain = {**json.loads(body), "reply_by_ms": market.now_ms + 1_500}
    request_id = f"{number:032x}"
    return codec.encode(
        kind="request",
        message_id=request_id,
        to="*",
        deal=request_id,
        re="",
        sent_ms=market.now_ms,
        expires_ms=market.now_ms + 1_500,
        plain=json.dumps(plain).encode(),
        key="",
    )


def storm(market: Market, seat: Seat, codec: Codec, count: int) -> None:
    for number in range(count):
        wire = request(market, codec, number)
        market.perform(seat, seat.desk.hear(wire, now_ms=market.now_ms))


def test_a_flood_of_requests_from_one_address_does_not_stop_other_deals() -> None:
    market = Market()
    seller = market.sellers[0]
    seller.desk.admission = Admission(address_per_s=20, address_burst=50)
    market.works = False
    running = market.ask("before")
    market.until(lambda: "task" in market.kinds())
    storm(market, seller, stranger("eve"), 300)
    opened = sum(1 for t in seller.desk.threads.values() if t.state is State.OFFERED)
    assert opened == 50
    assert seller.desk.counts["refused_capacity"] == 250
    later = market.ask("after")
    market.works = True
    market.restart(seller)
    market.until(lambda: running.outcome and later.outcome)
    for ask in (running, later):
        assert ask.outcome is not None
        assert ask.outcome.state is State.SETTLED


def test_a_flood_from_many_addresses_stops_strangers_and_not_deals() -> None:
    market = Market()
    seller = market.sellers[0]
    market.works = False
    running = market.ask("before")
    market.until(lambda: "agreed" in market.kinds())
    market.deliver()
    seller.desk.admission = Admission(per_s=1, burst=30)
    for n in range(60):
        wire = request(market, stranger(f"eve{n}"), n)
        market.perform(seller, seller.desk.hear(wire, now_ms=market.now_ms))
    assert seller.desk.counts["refused_capacity"] == 30
    market.works = True
    market.until(lambda: running.outcome)
    assert running.outcome is not None
    assert running.outcome.state is State.SETTLED


def bid(market: Market, codec: Codec, request_id: str, body: dict[str, Any], key: str) -> bytes:
    deal = thread_id(request_id, market.buyer.desk.me, codec.identity.address)
    return codec.encode(
        kind="offer",
        message_id=keccak256(deal.encode())[:16].hex(),
        to=market.buyer.desk.me,
        deal=deal,
        re=request_id,
        sent_ms=market.now_ms,
        expires_ms=market.now_ms + 10_000,
        plain=json.dumps(body).encode(),
        key=key,
    )


def test_a_flood_of_bids_is_read_up_to_bids_max_and_not_answered_beyond() -> None:
    market = Market(prices=())
    ask = market.ask("wanted", bids_max=4)
    other = market.ask("other", bids_max=4)
    body = {"nonsense": 1}
    buyer = market.buyer
    for n in range(50):
        wire = bid(market, stranger(f"bidder{n}"), ask.request_id, body, ask.request.key)
        market.perform(buyer, buyer.desk.hear(wire, now_ms=market.now_ms))
    assert ask.bids == 0  # None of these was an offer; they cost a look each, no more.
    ask.bids = ask.wish.bids_max
    nacks = market.kinds().count("nack")
    for n in range(50, 100):
        wire = bid(market, stranger(f"bidder{n}"), ask.request_id, body, ask.request.key)
        market.perform(buyer, buyer.desk.hear(wire, now_ms=market.now_ms))
    assert market.kinds().count("nack") == nacks
    assert buyer.desk.counts["refused_capacity"] == 50
    assert other.state is AskState.OPEN
    assert buyer.desk.buyer is not None


def test_an_offer_to_a_request_that_is_not_ours_is_not_looked_at() -> None:
    market = Market(prices=())
    wire = bid(market, stranger("bidder"), "0f" * 16, {}, "11" * 32)
    assert not market.buyer.desk.hear(wire, now_ms=market.now_ms)
    assert market.buyer.desk.counts == {"refused_capacity": 1}


def test_who_cannot_pay_is_not_bid_to() -> None:
    market = Market()
    seller = market.sellers[0].desk
    seller.admission = Admission(funded=lambda address: address != market.buyer.desk.me)
    market.ask()
    market.deliver()
    assert not seller.threads
    assert seller.counts == {"refused_funds": 1}
