"""Envelopes: what was signed is what counts, and a seal opens in its own place only."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coase.protocol.envelope import (
    check_signature,
    check_times,
    digest,
    open_body,
    pack,
    parse_body,
    public_key,
    read_header,
    seal,
    unseal,
)
from coase.protocol.errors import BadSignature, MalformedEnvelope, Refused
from coase.protocol.identity import Identity, keccak256
from coase.protocol.messages import (
    BODY_SIZE_MAX_BYTES,
    CLOCK_SKEW_MAX_MS,
    ENVELOPE_LIFE_MAX_MS,
    ENVELOPE_SIZE_MAX_BYTES,
    SEALED,
)

ANN = Identity(keccak256(b"ann"))
BOB = Identity(keccak256(b"bob"))
NOW = 1_700_000_000_000
SECRET = b"\x07" * 32
DEAL = "0d" * 16


def envelope(**changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "net": "local",
        "kind": "withdraw",
        "message_id": "01" * 16,
        "to": BOB.address,
        "deal": DEAL,
        "re": "",
        "seq": 0,
        "sent_ms": NOW,
        "expires_ms": NOW + 60_000,
        "sealed": False,
        "body": '{"reason":"no"}',
    }
    return pack(ANN, **{**fields, **changes})


def resigned(signed: bytes) -> bytes:
    return ANN.sign(digest(signed)) + signed


def changed(**changes: Any) -> bytes:
    """An envelope of Ann's with other JSON than ``pack`` would write, properly signed."""
    fields = json.loads(envelope()[65:])
    fields.update(changes)
    kept = {key: value for key, value in fields.items() if value != "LEFT OUT"}
    return resigned(json.dumps(kept).encode())


def test_what_was_packed_is_what_is_read() -> None:
    wire = envelope(re="02" * 16, seq=3, kind="task", body="é")
    header = read_header(wire)
    check_signature(wire, header)
    check_times(header, now_ms=NOW)
    assert (header.v, header.net, header.id, header.kind) == (1, "local", "01" * 16, "task")
    assert (header.sender, header.to, header.deal) == (ANN.address, BOB.address, DEAL)
    assert (header.re, header.seq, header.seal, header.body) == ("02" * 16, 3, "", "é")


@given(st.integers(min_value=0), st.integers(min_value=1, max_value=255))
def test_no_byte_of_it_can_be_changed(at: int, flip: int) -> None:
    wire = bytearray(envelope())
    wire[at % len(wire)] ^= flip
    with pytest.raises((MalformedEnvelope, BadSignature)):
        check_signature(bytes(wire), read_header(bytes(wire)))


def test_somebody_elses_name_cannot_be_signed_for() -> None:
    wire = changed(sender=BOB.address)
    with pytest.raises(BadSignature):
        check_signature(wire, read_header(wire))


def test_the_bytes_are_signed_as_they_came_whatever_their_spelling() -> None:
    spaced = json.dumps(json.loads(envelope()[65:]), indent=1, sort_keys=True).encode()
    wire = resigned(spaced)
    check_signature(wire, read_header(wire))


@pytest.mark.parametrize(
    "changes",
    [
        {"extra": 1},
        {"v": 2},
        {"v": "1"},
        {"v": True},
        {"net": "LOCAL"},
        {"net": "local\n"},
        {"net": "x" * 33},
        {"id": "01" * 15},
        {"id": "01" * 16 + "\n"},
        {"id": "0G" * 16},
        {"kind": "With"},
        {"kind": "a" * 17},
        {"kind": ""},
        {"sender": "0x" + "AB" * 20},
        {"to": "nobody"},
        {"deal": ""},
        {"re": "1"},
        {"seq": -1},
        {"seq": 2**40},
        {"seq": 1.0},
        {"sent_ms": -1},
        {"sent_ms": 2**53},
        {"sent_ms": 10**4000},
        {"expires_ms": "1"},
        {"seal": "rot13"},
        {"body": None},
        {"body": {"reason": "no"}},
        *({name: "LEFT OUT"} for name in json.loads(envelope()[65:])),
    ],
)
def test_a_header_that_is_not_exactly_right_is_no_envelope(changes: dict[str, Any]) -> None:
    with pytest.raises(MalformedEnvelope):
        read_header(changed(**changes))


@pytest.mark.parametrize(
    "signed",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"v":NaN}',
        b"[" * 10_000,
        b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
        b"9" * 60_000,
        envelope()[65:] + b"x",
        b"\xef\xbb\xbf" + envelope()[65:],
        envelope()[65:].replace(b'"no', b'"\\ud800'),
    ],
)
def test_rubbish_is_no_envelope(signed: bytes) -> None:
    with pytest.raises(MalformedEnvelope):
        read_header(resigned(signed))


def test_a_key_that_stands_twice_is_refused_in_header_and_body() -> None:
    signed = envelope()[65:]
    twice = signed.replace(b'"seq":0', b'"seq":1,"seq":0')
    with pytest.raises(MalformedEnvelope, match="twice"):
        read_header(resigned(twice))
    # Also where one of the two is written with an escape.
    escaped = signed.replace(b'"seq":0', b'"s\\u0065q":1,"seq":0')
    with pytest.raises(MalformedEnvelope, match="twice"):
        read_header(resigned(escaped))
    header = read_header(envelope(kind="ack"))
    with pytest.raises(Refused, match="twice"):
        open_body(header, b'{"level":"done","level":"taken"}')


@pytest.mark.parametrize("size", [0, 1, 65])
def test_an_envelope_is_longer_than_its_signature(size: int) -> None:
    with pytest.raises(MalformedEnvelope, match=f"{size} bytes"):
        read_header(b"x" * size)


def test_an_envelope_has_at_most_64_kib() -> None:
    room = ENVELOPE_SIZE_MAX_BYTES - len(envelope(body=""))
    largest = envelope(body="x" * room)
    assert len(largest) == ENVELOPE_SIZE_MAX_BYTES
    read_header(largest)
    with pytest.raises(MalformedEnvelope):
        read_header(envelope(body="x" * (room + 1)))


@pytest.mark.parametrize(
    ("sent", "expires", "reason"),
    [
        (0, 1, ""),
        (0, ENVELOPE_LIFE_MAX_MS, ""),
        (0, ENVELOPE_LIFE_MAX_MS + 1, "malformed"),
        (CLOCK_SKEW_MAX_MS, CLOCK_SKEW_MAX_MS + 1, ""),
        (CLOCK_SKEW_MAX_MS + 1, CLOCK_SKEW_MAX_MS + 2, "clock"),
        (-100_000, -CLOCK_SKEW_MAX_MS, ""),
        (-100_000, -CLOCK_SKEW_MAX_MS - 1, "expired"),
    ],
)
def test_an_envelope_lives_a_while_by_a_clock_that_may_differ(
    sent: int, expires: int, reason: str
) -> None:
    header = read_header(envelope(sent_ms=NOW + sent, expires_ms=NOW + expires))
    if not reason:
        check_times(header, now_ms=NOW)
        return
    with pytest.raises(Refused) as refused:
        check_times(header, now_ms=NOW)
    assert refused.value.reason == reason


# ---- seals ---------------------------------------------------------------------------------


@given(st.binary(max_size=500))
def test_a_seal_opens_with_its_key_in_its_place(plain: bytes) -> None:
    body = seal(plain, public_key(SECRET), deal=DEAL, kind="task", seq=2)
    assert unseal(body, SECRET, deal=DEAL, kind="task", seq=2) == plain
    assert base64.b64encode(plain).decode() not in body or len(plain) < 8


@pytest.mark.parametrize(
    "place",
    [
        {"deal": "0e" * 16},
        {"kind": "result"},
        {"seq": 1},
        {"secret": b"\x08" * 32},
        {"body": "?"},
        {"body": ""},
        {"body": "AAAA"},
        {"body": base64.b64encode(b"\0" * 80).decode()},
        {"body": "é"},
    ],
)
def test_a_seal_opens_nowhere_else(place: dict[str, Any]) -> None:
    body = seal(b"secret", public_key(SECRET), deal=DEAL, kind="task")
    there: dict[str, Any] = {"body": body, "secret": SECRET, "deal": DEAL, "kind": "task"}
    there |= place
    with pytest.raises(Refused) as refused:
        unseal(there.pop("body"), there.pop("secret"), **there)
    assert refused.value.reason == "malformed"


def test_each_seal_differs_so_that_equal_bodies_do_not_show() -> None:
    key = public_key(SECRET)
    assert seal(b"x", key, deal=DEAL, kind="task") != seal(b"x", key, deal=DEAL, kind="task")


def test_only_sealed_kinds_are_sealed_and_all_of_them_are() -> None:
    for kind, sealed in (("withdraw", False), ("ack", True)):
        header = read_header(envelope(kind=kind, sealed=sealed))
        assert (kind in SEALED) is not sealed
        with pytest.raises(Refused) as refused:
            open_body(header, b"{}")
        assert refused.value.reason == "not_sealed"


def test_a_kind_that_nobody_knows_is_refused_by_name() -> None:
    with pytest.raises(Refused) as refused:
        open_body(read_header(envelope(kind="unheard")), b"{}")
    assert (refused.value.reason, refused.value.detail) == ("unknown_kind", "unheard")


def test_a_body_above_all_pieces_is_too_large() -> None:
    with pytest.raises(Refused) as refused:
        open_body(read_header(envelope(kind="ack")), b"x" * (BODY_SIZE_MAX_BYTES + 1))
    assert refused.value.reason == "too_large"


def test_a_refusal_names_the_field_and_never_what_it_held() -> None:
    with pytest.raises(Refused, match=r"withdraw\.reason") as refused:
        parse_body("withdraw", b'{"reason":["sesame"]}')
    assert "sesame" not in str(refused.value)
