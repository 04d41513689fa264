"""Large bodies: cut, lost, mixed, forged, and put together again."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coase.agents.pieces import PARTIAL_AGE_MAX_MS, PARTIAL_MAX, Pieces, piece_id, split
from coase.protocol.envelope import Message
from coase.protocol.errors import LocalProtocolError, Refused
from coase.protocol.identity import keccak256
from coase.protocol.messages import (
    BODY_INLINE_MAX_BYTES,
    PIECE_SIZE_MAX_BYTES,
    PIECES_MAX,
    Header,
    Withdraw,
)

if TYPE_CHECKING:
    from coase.agents.pieces import Slice, Whole

NOW = 1_700_000_000_000
ANN = "0x" + "0a" * 20
DEAL = "0d" * 16
MESSAGE = "01" * 16


def message(plain: bytes, message_id: str = MESSAGE) -> Message:
    return Message(
        kind="task",
        id=message_id,
        sender=ANN,
        to="0x" + "0b" * 20,
        deal=DEAL,
        re="",
        sent_ms=NOW,
        expires_ms=NOW + 1,
        body=Withdraw(reason=""),  # What it says does not matter here.
        plain=plain,
    )


def header(piece: Slice, *, sender: str = ANN, deal: str = DEAL, **changes: Any) -> Header:
    fields: dict[str, Any] = {
        "v": 1,
        "net": "t",
        "id": piece.id,
        "kind": "piece",
        "sender": sender,
        "to": "0x" + "0b" * 20,
        "deal": deal,
        "re": "",
        "seq": piece.seq,
        "sent_ms": NOW,
        "expires_ms": NOW + 1,
        "seal": "hpke",
        "body": "",
    }
    return Header(**{**fields, **changes})


def cut(plain: bytes, message_id: str = MESSAGE) -> list[Slice]:
    pieces = split(message(plain, message_id))
    assert pieces is not None
    return pieces


def feed(pieces: Pieces, slices: list[Slice], **where: Any) -> list[Whole]:
    wholes = (pieces.add(header(one, **where), one.plain, now_ms=NOW) for one in slices)
    return [whole for whole in wholes if whole is not None]


@given(st.integers(0, 2**32), st.integers(BODY_INLINE_MAX_BYTES + 1, 400_000))
def test_a_body_comes_whole_out_of_its_pieces_in_any_order(seed: int, size: int) -> None:
    rng = random.Random(seed)
    plain = rng.randbytes(size)
    slices = cut(plain)
    twice = slices * 2
    rng.shuffle(twice)
    wholes = feed(Pieces(), twice)
    assert wholes[0].plain == plain
    assert (wholes[0].header.kind, wholes[0].header.id) == ("task", MESSAGE)
    assert all(len(one.plain) <= PIECE_SIZE_MAX_BYTES for one in slices)


def test_what_fits_one_envelope_is_not_cut() -> None:
    assert split(message(b"x" * BODY_INLINE_MAX_BYTES)) is None
    assert split(message(b"x" * (BODY_INLINE_MAX_BYTES + 1))) is not None


def test_the_largest_body_has_just_as_many_pieces_as_there_may_be() -> None:
    room = len(cut(b"x" * 200_000)[0].plain.partition(b"\n")[2])
    assert len(cut(bytes(room * PIECES_MAX))) == PIECES_MAX
    with pytest.raises(LocalProtocolError, match="are allowed"):
        split(message(bytes(room * PIECES_MAX + 1)))


def test_ids_of_pieces_are_the_same_each_time() -> None:
    slices = cut(b"x" * 100_000)
    assert [one.id for one in slices] == [piece_id(MESSAGE, n) for n in range(3)]
    assert len({one.id for one in slices}) == 3


def test_afterwards_every_piece_tells_of_which_message_it_was() -> None:
    pieces, slices = Pieces(), cut(b"x" * 100_000)
    feed(pieces, slices[:-1])
    assert pieces.whole_of(ANN, slices[0].id) == ""
    feed(pieces, slices[-1:])
    assert {pieces.whole_of(ANN, one.id) for one in slices} == {MESSAGE}
    assert pieces.whole_of("0x" + "0b" * 20, slices[0].id) == ""


def head(**changes: object) -> bytes:
    plain = b"x" * 100_000
    fields = {
        "message": MESSAGE,
        "kind": "task",
        "count": 3,
        "content": "0x" + keccak256(plain).hex(),
    }
    return json.dumps({**fields, **changes}).encode()


@pytest.mark.parametrize(
    ("plain", "changes"),
    [
        (b"", {}),
        (b"{}\nabc", {}),
        (head(count=0) + b"\nabc", {}),
        (head(count=PIECES_MAX + 1) + b"\nabc", {}),
        (head(kind="Task") + b"\nabc", {}),
        (head(more=1) + b"\nabc", {}),
        (head() + b"\nabc", {"seq": 3}),
        (head(message="02" * 16) + b"\nabc", {}),
        (head() + b"\nabc", {"id": "03" * 16}),
        (head() + b"\n" + b"x" * (PIECE_SIZE_MAX_BYTES + 1), {}),
    ],
)
def test_a_piece_that_is_not_right_is_refused(plain: bytes, changes: dict[str, Any]) -> None:
    pieces = Pieces()
    first = cut(b"x" * 100_000)[0]
    with pytest.raises(Refused) as refused:
        pieces.add(header(first, **changes), plain, now_ms=NOW)
    assert refused.value.reason == "malformed"
    assert feed(pieces, cut(b"x" * 100_000))  # And it did no harm.


def test_pieces_that_disagree_about_their_body_are_refused() -> None:
    pieces, slices = Pieces(), cut(b"x" * 100_000)
    feed(pieces, slices[:1])
    other = slices[1].plain.replace(b'"count":3', b'"count":4')
    with pytest.raises(Refused, match="disagree"):
        pieces.add(header(slices[1]), other, now_ms=NOW)


def test_a_body_that_is_not_what_its_pieces_announced_is_refused() -> None:
    slices = cut(b"x" * 100_000)
    pieces = Pieces()
    feed(pieces, slices[:2])
    forged = slices[2].plain[:-1] + b"y"
    with pytest.raises(Refused, match="not the body"):
        pieces.add(header(slices[2]), forged, now_ms=NOW)


def test_a_deal_puts_one_body_together_at_a_time() -> None:
    pieces = Pieces()
    old, new = cut(b"x" * 100_000), cut(b"y" * 100_000, "02" * 16)
    assert feed(pieces, old[:2]) == []
    assert [whole.plain[:1] for whole in feed(pieces, new)] == [b"y"]
    assert [whole.plain[:1] for whole in feed(pieces, old)] == [b"x"]


def test_who_begins_many_bodies_loses_its_own_and_nobody_elses() -> None:
    pieces, mine = Pieces(), cut(b"x" * 100_000)
    feed(pieces, mine[:2])
    for n in range(3 * PARTIAL_MAX):
        feed(pieces, cut(b"y" * 100_000)[:1], sender="0x" + "0e" * 20, deal=f"{n:032x}")
    assert [whole.plain[:1] for whole in feed(pieces, mine[2:])] == [b"x"]


def test_what_is_never_finished_is_forgotten() -> None:
    pieces, slices = Pieces(), cut(b"x" * 100_000)
    feed(pieces, slices[:2])
    later = NOW + PARTIAL_AGE_MAX_MS + 1
    other = cut(b"y" * 100_000)[0]
    pieces.add(header(other, deal="0e" * 16), other.plain, now_ms=later)
    assert pieces.add(header(slices[2]), slices[2].plain, now_ms=later) is None


def test_unfinished_bodies_have_a_common_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coase.agents.pieces.PARTIAL_MAX_BYTES", 60_000)
    slices = cut(b"x" * 150_000)
    pieces = Pieces()
    feed(pieces, slices[:1])
    with pytest.raises(Refused) as refused:
        feed(pieces, slices[1:2])
    assert refused.value.reason == "too_large"
