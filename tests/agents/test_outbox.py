"""What was said is said again until it is answered, by whom it was said to."""

from __future__ import annotations

from typing import Any

from coase.agents.outbox import RENEW_BEFORE_EXPIRY_MS, Outbox
from coase.agents.pieces import piece_id
from coase.protocol.envelope import Message
from coase.protocol.messages import (
    ENVELOPE_LIFE_MAX_MS,
    RESEND_FIRST_MS,
    RESEND_MAX_MS,
    Withdraw,
)

NOW = 1_700_000_000_000
BOB, EVE = "0x" + "0b" * 20, "0x" + "0e" * 20
MESSAGE = "01" * 16


class Pen:
    """Encodes by writing down what was asked for."""

    def __init__(self) -> None:
        self.written = 0

    def __call__(
        self, message: Message, kind: str, id_: str, plain: bytes, key: str, **more: Any
    ) -> bytes:
        self.written += 1
        return f"{kind} {id_} {more['now_ms']}".encode()


def message(plain: bytes = b"{}", *, kind: str = "task", message_id: str = MESSAGE) -> Message:
    return Message(
        kind=kind,
        id=message_id,
        sender="0x" + "0a" * 20,
        to=BOB,
        deal="0d" * 16,
        re="",
        sent_ms=NOW,
        expires_ms=NOW + 1,
        body=Withdraw(reason=""),
        plain=plain,
    )


def box(until_ms: int = NOW + 10**6, **what: Any) -> Outbox:
    outbox = Outbox(Pen())
    outbox.send(message(**what), "key", until_ms, now_ms=NOW)
    return outbox


def test_it_is_repeated_at_doubling_intervals_up_to_a_limit() -> None:
    outbox = box()
    said = []
    for passed in range(0, 30_000, 50):
        again, late = outbox.due(now_ms=NOW + passed)
        assert not late
        said += [passed] * len(again)
    pauses = [b - a for a, b in zip([0, *said], said, strict=False)]
    assert pauses[:5] == [RESEND_FIRST_MS, 500, 1_000, 2_000, 4_000]
    assert set(pauses[5:]) == {RESEND_MAX_MS}


def test_what_needs_no_answer_is_said_once() -> None:
    outbox = Outbox(Pen())
    assert outbox.send(message(), "key", 0, now_ms=NOW) == (f"task {MESSAGE} {NOW}".encode(),)
    assert len(outbox) == 0
    assert outbox.next_ms() is None


def test_an_answer_counts_only_from_whom_it_was_said_to() -> None:
    outbox = box()
    assert outbox.answered(MESSAGE, by=EVE) is None
    assert not outbox.awaits(MESSAGE, EVE)
    assert outbox.awaits(MESSAGE, BOB)
    assert outbox.answered("", by=BOB) is None
    assert outbox.answered("02" * 16, by=BOB) is None
    assert len(outbox) == 1
    assert outbox.answered(MESSAGE, by=BOB) is not None
    assert len(outbox) == 0
    assert outbox.due(now_ms=NOW + 10_000) == ([], [])


def test_what_nobody_answered_in_time_is_given_back() -> None:
    outbox = box(NOW + 1_000)
    again, late = outbox.due(now_ms=NOW + 999)
    assert (len(again), late) == (1, [])
    again, late = outbox.due(now_ms=NOW + 1_000)
    assert (again, [m.id for m in late]) == ([], [MESSAGE])
    assert outbox.next_ms() is None


def test_it_is_told_when_to_come_back() -> None:
    outbox = box(NOW + 600)
    assert outbox.next_ms() == NOW + RESEND_FIRST_MS
    outbox.due(now_ms=NOW + RESEND_FIRST_MS)
    assert outbox.next_ms() == NOW + 600


def test_an_envelope_that_would_expire_is_made_anew() -> None:
    outbox = box()
    for passed in range(0, ENVELOPE_LIFE_MAX_MS + 20_000, 250):
        again, _ = outbox.due(now_ms=NOW + passed)
        for effect in again:
            made_ms = int(effect.wire.split()[2])
            assert NOW + passed - made_ms <= ENVELOPE_LIFE_MAX_MS - RENEW_BEFORE_EXPIRY_MS


def test_only_missing_pieces_are_repeated_and_all_if_the_whole_was_forgotten() -> None:
    outbox = box(plain=b"x" * 100_000)
    assert len(outbox) == 1
    for seq in (0, 2):
        outbox.answered(piece_id(MESSAGE, seq), by=BOB)
    again, _ = outbox.due(now_ms=NOW + 1_000)
    assert [effect.wire.split()[1].decode() for effect in again] == [piece_id(MESSAGE, 1)]
    outbox.answered(piece_id(MESSAGE, 1), by=BOB)
    assert len(outbox) == 1
    again, _ = outbox.due(now_ms=NOW + 2_000)
    assert len(again) == 3
    outbox.answered(MESSAGE, by=BOB)
    assert len(outbox) == 0
    assert not outbox.awaits(piece_id(MESSAGE, 1), BOB)


def test_a_deal_that_is_over_has_nothing_to_say_but_its_consent() -> None:
    outbox = Outbox(Pen())
    outbox.send(message(), "key", NOW + 10**6, now_ms=NOW)
    outbox.send(message(kind="settle", message_id="02" * 16), "key", NOW + 10**6, now_ms=NOW)
    outbox.drop_deal("ff" * 16)
    assert len(outbox) == 2
    outbox.drop_deal("0d" * 16)
    assert [effect.wire.split()[0] for effect in outbox.due(now_ms=NOW + 500)[0]] == [b"settle"]
