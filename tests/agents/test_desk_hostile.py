"""What strangers and counterparties may throw at a desk: it never raises, and nothing moves."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coase.agents.admission import Admission
from coase.agents.ports import Codec
from coase.agents.steps import Notice, Step, Transmit
from coase.protocol.envelope import digest, public_key
from coase.protocol.identity import Identity, keccak256
from coase.protocol.messages import (
    BODIES,
    CLOCK_SKEW_MAX_MS,
    ENVELOPE_LIFE_MAX_MS,
    ENVELOPE_SIZE_MAX_BYTES,
    SEALED,
)
from tests.agents.desks import Market, Seat, head_of, kind_of

if TYPE_CHECKING:
    from coase.agents.desk import Desk

EVE: Final = Identity(keccak256(b"eve"))


def mid_deal() -> Market:
    """A market in the middle of a deal, with an offer open beside it."""
    market = Market(prices=(1_000, 900))
    market.works = False
    market.ask()
    market.until(lambda: "task" in market.kinds())
    market.pass_ms(1_000)
    market.ask("another", bids_max=5)
    market.deliver()
    return market


MARKET: Final = mid_deal()
"""Shared by all: nothing here may change it, which each test looks at."""


def snapshot(desk: Desk) -> object:
    """Everything that a desk remembers of its deals, copied through and through."""
    threads = {deal: copy.deepcopy(thread) for deal, thread in desk.threads.items()}
    asks = {key: (ask.state, ask.bids) for key, ask in getattr(desk.buyer, "asks", {}).items()}
    return threads, dict(desk.jobs), desk.bound(), asks, len(desk._outbox)


def hear_unmoved(seat: Seat, wire: bytes, *, answers: tuple[str, ...] = ()) -> Step:
    """Let a desk hear something that must change nothing, and answer with these kinds only."""
    before = snapshot(seat.desk)
    step = seat.desk.hear(wire, now_ms=MARKET.now_ms)
    assert snapshot(seat.desk) == before
    assert not step.records
    assert not step.closed
    assert [kind_of(e.wire) for e in step.effects if isinstance(e, Transmit)] == list(answers)
    assert not [e for e in step.effects if not isinstance(e, Transmit | Notice)]
    return step


def answer_of(step: Step) -> dict[str, Any]:
    """The body of what a step says in answer."""
    wire = next(e.wire for e in step.effects if isinstance(e, Transmit))
    body: dict[str, Any] = json.loads(head_of(wire)["body"])
    return body


def forged(codec: Codec, **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "kind": "withdraw",
        "message_id": keccak256(repr(sorted(changes.items())).encode())[:16].hex(),
        "to": MARKET.sellers[0].desk.me,
        "deal": next(iter(MARKET.sellers[0].desk.threads)),
        "re": "",
        "sent_ms": MARKET.now_ms,
        "expires_ms": MARKET.now_ms + 60_000,
        "plain": b'{"reason":"x"}',
        "key": public_key(b"\1" * 32),
    }
    return codec.encode(**{**fields, **changes})


def eve(net: str = "t") -> Codec:
    return Codec(EVE, net=net)


SEATS: Final = (*MARKET.sellers, MARKET.buyer)
WIRES: Final = [wire for _, _, wire in MARKET.sent]


@given(st.sampled_from(SEATS), st.binary(max_size=300))
def test_random_bytes(seat: Seat, wire: bytes) -> None:
    hear_unmoved(seat, wire)


@given(st.sampled_from(SEATS), st.sampled_from(WIRES), st.data())
def test_envelopes_with_flipped_bits_or_cut_short(seat: Seat, wire: bytes, data: Any) -> None:
    at = data.draw(st.integers(0, len(wire) - 1))
    flipped = wire[:at] + bytes((wire[at] ^ data.draw(st.integers(1, 255)),)) + wire[at + 1 :]
    hear_unmoved(seat, flipped)
    hear_unmoved(seat, wire[:at])
    hear_unmoved(seat, wire + b" ")


@given(
    st.sampled_from(SEATS),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
)
def test_signed_json_that_is_no_header(seat: Seat, value: object) -> None:
    signed = json.dumps(value).encode(errors="surrogatepass")
    hear_unmoved(seat, EVE.sign(digest(signed)) + signed)


@pytest.mark.parametrize(
    "signed",
    [
        b"[" * 30_000,
        b'{"a":' * 10_000,
        b"1" * 60_000,
        b'{"v":1,"v":1}',
        b"\xff" * 100,
        b'{"seq":' + b"9" * 5_000 + b"}",
    ],
)
def test_json_that_is_deep_or_huge_or_double(signed: bytes) -> None:
    for seat in SEATS:
        hear_unmoved(seat, EVE.sign(digest(signed)) + signed)


@given(
    st.sampled_from(SEATS),
    st.sampled_from(sorted(BODIES)),
    st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=8) | st.none()),
)
@settings(max_examples=200)
def test_a_strangers_words_about_somebody_elses_deal(
    seat: Seat, kind: str, body: dict[str, Any]
) -> None:
    seat.desk.admission = Admission()
    for deal in (*seat.desk.threads, "00" * 16):
        plain = json.dumps(body).encode()
        wire = forged(eve(), kind=kind, to=seat.desk.me, deal=deal, plain=plain)
        before = snapshot(seat.desk)
        step = seat.desk.hear(wire, now_ms=MARKET.now_ms)
        assert snapshot(seat.desk) == before
        assert not step.records
        for effect in step.effects:
            assert isinstance(effect, Transmit)
            assert effect.to == EVE.address
            assert kind_of(effect.wire) == "nack"


def counterparty(seat: Seat) -> tuple[Codec, str, str]:
    """The codec of the other side of a deal of ``seat``, the deal, and the key to seal to."""
    thread = next(t for t in seat.desk.threads.values() if t.job_id)
    other = MARKET.seats[thread.counterparty].desk
    return other.codec, thread.deal, seat.desk.codec.public_key(thread.secret)


@given(
    st.sampled_from((MARKET.sellers[1], MARKET.buyer)),
    st.sampled_from(sorted(SEALED - {"evidence", "piece", "chunk"})),
    st.one_of(
        st.binary(max_size=50),
        st.dictionaries(st.text(max_size=8), st.integers()).map(lambda d: json.dumps(d).encode()),
    ),
)
def test_a_counterpartys_bad_bodies_are_answered_with_a_reason(
    seat: Seat, kind: str, plain: bytes
) -> None:
    codec, deal, key = counterparty(seat)
    wire = forged(codec, kind=kind, to=seat.desk.me, deal=deal, plain=plain, key=key)
    if seat.desk._heard.knows(codec.identity.address, head_of(wire)["id"]):
        return
    step = hear_unmoved(seat, wire, answers=("nack",))
    nack = next(e.wire for e in step.effects if isinstance(e, Transmit))
    assert json.loads(head_of(nack)["body"])["reason"] == "malformed"
    assert head_of(nack)["re"] == head_of(wire)["id"]


@given(st.sampled_from((MARKET.sellers[1], MARKET.buyer)), st.binary(max_size=50))
def test_a_counterpartys_bad_chunk_is_not_even_answered(seat: Seat, plain: bytes) -> None:
    codec, deal, key = counterparty(seat)
    wire = forged(codec, kind="chunk", to=seat.desk.me, deal=deal, plain=plain, key=key)
    hear_unmoved(seat, wire, answers=())


def test_who_is_no_side_of_a_deal_hears_that_there_is_none() -> None:
    for seat in (MARKET.sellers[1], MARKET.buyer):
        _, deal, key = counterparty(seat)
        wire = forged(eve(), kind="withdraw", to=seat.desk.me, deal=deal, key=key)
        step = hear_unmoved(seat, wire, answers=("nack",))
        assert answer_of(step)["reason"] == "unknown_deal"


def test_what_is_not_sealed_to_this_deal_is_refused() -> None:
    codec, deal, _ = counterparty(MARKET.sellers[1])
    wire = forged(
        codec, kind="settle", to=MARKET.sellers[1].desk.me, deal=deal, message_id="0a" * 16
    )
    hear_unmoved(MARKET.sellers[1], wire, answers=("nack",))


@pytest.mark.parametrize(
    ("changes", "counted"),
    [
        ({"to": "0x" + "99" * 20}, "misaddressed"),
        ({"to": "*"}, "refused_malformed"),
        ({"kind": "request", "to": "*", "plain": b"{}"}, "refused_malformed"),
        ({"kind": "describe", "to": "*", "plain": b"[]"}, "refused_malformed"),
    ],
)
def test_what_is_not_for_us_is_not_answered(changes: dict[str, Any], counted: str) -> None:
    seller = MARKET.sellers[0]
    before = seller.desk.counts.get(counted, 0)
    hear_unmoved(seller, forged(eve(), **changes))
    assert seller.desk.counts[counted] == before + 1


def test_another_network_is_not_ours() -> None:
    before = MARKET.sellers[0].desk.counts.get("misaddressed", 0)
    hear_unmoved(MARKET.sellers[0], forged(eve("elsewhere")))
    assert MARKET.sellers[0].desk.counts["misaddressed"] == before + 1


def test_our_own_words_coming_back_are_nothing() -> None:
    for seat in SEATS:
        for wire in WIRES:
            if head_of(wire)["sender"] == seat.desk.me:
                hear_unmoved(seat, wire)


def test_oversize_is_dropped_before_it_is_read() -> None:
    hear_unmoved(MARKET.buyer, b"{" * (ENVELOPE_SIZE_MAX_BYTES + 1))
    assert MARKET.buyer.desk.counts["malformed"] > 0


@pytest.mark.parametrize(
    ("sent", "expires", "reason"),
    [
        (CLOCK_SKEW_MAX_MS + 1, CLOCK_SKEW_MAX_MS + 2, "clock"),
        (-ENVELOPE_LIFE_MAX_MS, -CLOCK_SKEW_MAX_MS - 1, "expired"),
        (0, ENVELOPE_LIFE_MAX_MS + 1, "malformed"),
    ],
)
def test_a_clock_that_is_wrong_is_told_the_time_once(sent: int, expires: int, reason: str) -> None:
    seller, now = MARKET.sellers[0], MARKET.now_ms
    wire = forged(eve(), sent_ms=now + sent, expires_ms=now + expires)
    step = hear_unmoved(seller, wire, answers=("nack",))
    body = json.loads(
        head_of(next(e.wire for e in step.effects if isinstance(e, Transmit)))["body"]
    )
    assert (body["reason"], body["now_ms"]) == (reason, now)
    again = seller.desk.hear(wire, now_ms=now)
    assert len(again.effects) <= 1  # The same answer, or none; never a new one.
    flipped = bytes((wire[0] ^ 1,)) + wire[1:]
    hear_unmoved(seller, flipped)


def test_who_is_told_that_its_clock_is_wrong_hears_it_though_the_others_clock_is() -> None:
    market = Market()
    market.lost = lambda to, wire: kind_of(wire) == "accept"
    market.ask()
    market.until(lambda: "accept" in market.kinds())
    accept = next(wire for kind, _, wire in market.sent if kind == "accept")
    late_ms = market.now_ms - 10 * CLOCK_SKEW_MAX_MS
    step = market.sellers[0].desk.hear(accept, now_ms=late_ms)
    nack = next(e.wire for e in step.effects if isinstance(e, Transmit))
    assert json.loads(head_of(nack)["body"])["reason"] == "clock"
    market.lost = lambda to, wire: True
    heard = market.buyer.desk.hear(nack, now_ms=market.now_ms)
    told = [e.detail for e in heard.effects if isinstance(e, Notice) and e.kind == "clock"]
    assert told == [f"ours is {10 * CLOCK_SKEW_MAX_MS} ms ahead"]


def test_a_kind_that_nobody_knows_is_answered_to_verified_senders_only() -> None:
    seller = MARKET.sellers[0]
    wire = forged(eve(), kind="unheardof", deal="00" * 16)
    step = hear_unmoved(seller, wire, answers=("nack",))
    body = json.loads(
        head_of(next(e.wire for e in step.effects if isinstance(e, Transmit)))["body"]
    )
    assert body["reason"] == "unknown_kind"
    unsigned = bytes(65) + forged(eve(), kind="unheardof", deal="11" * 16)[65:]
    hear_unmoved(seller, unsigned)


def test_a_repetition_is_answered_to_its_verified_sender_only() -> None:
    seller = MARKET.sellers[1]
    accept = next(wire for kind, to, wire in MARKET.sent if kind == "accept")
    hear_unmoved(seller, accept, answers=("agreed",))
    hear_unmoved(seller, bytes((accept[0] ^ 1,)) + accept[1:])
    # Nor does a forged repetition of a task make it sign for an input again.
    task = next(wire for kind, to, wire in MARKET.sent if kind == "task")
    forged_task = bytes(65) + task[65:]
    hear_unmoved(seller, forged_task)


def test_an_ack_signs_for_an_input_only_if_it_came() -> None:
    market = Market()
    ask = market.ask()
    market.until(lambda: "agreed" in market.kinds())
    market.deliver()
    seller, buyer = market.sellers[0].desk, market.buyer.desk
    thread = seller.threads[ask.chosen]
    other = next(w for kind, _, w in market.sent if kind == "accept")
    fake = buyer.codec.encode(
        kind="task",
        message_id=head_of(other)["id"],
        to=seller.me,
        deal=ask.chosen,
        re="",
        sent_ms=market.now_ms,
        expires_ms=market.now_ms + 1_000,
        plain=b"{}",
        key=seller.codec.public_key(thread.secret),
    )
    seller._heard._answers.clear()
    market.perform(market.sellers[0], seller.hear(fake, now_ms=market.now_ms))
    ticked = seller.tick(now_ms=market.now_ms + 1_000)
    acks = [e.wire for e in ticked.effects if isinstance(e, Transmit) and kind_of(e.wire) == "ack"]
    assert acks
    assert all(json.loads(head_of(wire)["body"])["signature"] == "" for wire in acks)


def test_a_stranger_cannot_answer_for_somebody_else() -> None:
    market = Market()
    market.lost = lambda to, wire: kind_of(wire) in ("agreed", "nack")
    market.ask()
    market.until(lambda: "accept" in market.kinds())
    buyer = market.buyer.desk
    accept = next(wire for kind, _, wire in market.sent if kind == "accept")
    evidence = forged(
        eve(),
        kind="evidence",
        to=buyer.me,
        deal="00" * 16,
        re=head_of(accept)["id"],
        key=buyer.codec.public_key(buyer.inbox_secret),
    )
    waiting = len(buyer._outbox)
    for kind in ("ack", "nack"):
        body = {"level": "taken"} if kind == "ack" else {"reason": "funds", "detail": ""}
        body |= {"now_ms": 0} if kind == "nack" else {}  # type: ignore[dict-item]
        wire = forged(
            eve(), kind=kind, to=buyer.me, re=head_of(accept)["id"], plain=json.dumps(body).encode()
        )
        buyer.hear(wire, now_ms=market.now_ms)
    buyer.hear(evidence, now_ms=market.now_ms)
    assert len(buyer._outbox) == waiting
    assert len(buyer.threads) == 1


def test_a_buyers_key_to_which_nothing_can_be_sealed_is_no_request() -> None:
    request = json.loads(head_of(next(w for k, _, w in MARKET.sent if k == "request"))["body"])
    for key in ("00" * 32, "01" + "00" * 31):
        plain = json.dumps({**request, "key": key}).encode()
        hear_unmoved(MARKET.sellers[0], forged(eve(), kind="request", to="*", plain=plain))


def test_a_piece_comes_only_in_a_deal_that_binds() -> None:
    market = Market()
    market.ask(bids_max=5)
    market.deliver()
    seller, buyer = market.sellers[0].desk, market.buyer.desk
    thread = next(iter(seller.threads.values()))
    wire = buyer.codec.encode(
        kind="piece",
        message_id="0c" * 16,
        to=seller.me,
        deal=thread.deal,
        re="",
        sent_ms=market.now_ms,
        expires_ms=market.now_ms + 1_000,
        plain=b"{}\nx",
        key=seller.codec.public_key(thread.secret),
    )
    seller.hear(wire, now_ms=market.now_ms)
    assert seller.counts["refused_wrong_state"] == 1
