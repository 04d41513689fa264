"""Who a panel is, whose signatures count, and where each unit of its fee goes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coase.escrow.lifecycle import Payout
from coase.escrow.panel import MEMBERS_MAX, Constitution, fee_shares, signers_of
from coase.protocol.errors import CallReverted
from coase.protocol.identity import Identity, keccak256
from coase.protocol.types import ZERO_ADDRESS

ARBITERS = sorted(
    (Identity(keccak256(bytes([number]))) for number in range(5)), key=lambda one: one.address
)
MEMBERS = tuple(arbiter.address for arbiter in ARBITERS)
THREE_OF_FIVE = Constitution.of(3, MEMBERS)
DIGEST = keccak256(b"ruling")
STRANGER = "0x" + "57" * 20
FACTORY, CODE = "0x" + "9a" * 20, "0x" + "9c" * 20


def signed(*numbers: int, digest: bytes = DIGEST) -> tuple[bytes, ...]:
    return tuple(
        arbiter.sign(digest) if number in numbers else b""
        for number, arbiter in enumerate(ARBITERS)
    )


def counted(signatures: tuple[bytes, ...], caller: str = STRANGER) -> tuple[str, ...]:
    return signers_of(THREE_OF_FIVE, DIGEST, signatures, caller=caller)


def refused(signatures: tuple[bytes, ...], caller: str = STRANGER) -> tuple[object, ...]:
    with pytest.raises(CallReverted) as caught:
        counted(signatures, caller)
    return caught.value.error, *caught.value.values


def test_order_does_not_matter_and_each_member_is_one() -> None:
    assert Constitution.of(3, reversed(MEMBERS)) == THREE_OF_FIVE
    for threshold, members, error in (
        (0, MEMBERS, "BadThreshold"),
        (6, MEMBERS, "BadThreshold"),
        (0, (), "BadThreshold"),
        (1, [f"0x{n + 1:040x}" for n in range(MEMBERS_MAX + 1)], "BadThreshold"),
        (1, (MEMBERS[0], MEMBERS[0]), "NotAscending"),
        (1, (ZERO_ADDRESS, MEMBERS[0]), "NotAscending"),
    ):
        with pytest.raises(CallReverted) as caught:
            Constitution.of(threshold, members)
        assert caught.value.error == error


def test_the_address_says_who_and_how_many() -> None:
    places = {
        Constitution.of(threshold, members).address(factory=factory, code=code)
        for threshold in (1, 2)
        for members in (MEMBERS[:2], MEMBERS[:3])
        for factory, code in ((FACTORY, CODE), (CODE, FACTORY))
    }
    assert len(places) == 8
    assert all(place == place.lower() and len(place) == 42 for place in places)


def test_k_of_n_signatures_count() -> None:
    assert counted(signed(0, 2, 4)) == (MEMBERS[0], MEMBERS[2], MEMBERS[4])
    assert counted(signed(*range(5))) == MEMBERS
    assert refused(signed(0, 2)) == ("TooFew", 2, 3)
    assert refused(signed()) == ("TooFew", 0, 3)


def test_a_calling_member_has_signed_once() -> None:
    assert counted(signed(0, 2), MEMBERS[4]) == (MEMBERS[0], MEMBERS[2], MEMBERS[4])
    assert refused(signed(0, 2), MEMBERS[2]) == ("TooFew", 2, 3)


def test_a_wrong_signature_is_told_and_not_passed_over() -> None:
    other = signed(3, digest=keccak256(b"another ruling"))
    mixed = (*signed(0, 1, 2)[:3], other[3], b"")
    assert refused(mixed) == ("BadSignature", MEMBERS[3])
    swapped = (signed(1)[1], *signed(1, 2, 3)[1:])
    assert refused(swapped) == ("BadSignature", MEMBERS[0])
    assert refused(signed(0, 1, 2)[:4]) == ("WrongCount", 4, 5)
    assert refused((*signed(0, 1, 2), b"")) == ("WrongCount", 6, 5)


def test_places_are_the_members_order() -> None:
    given_ = {MEMBERS[3]: b"d", MEMBERS[0]: b"a", STRANGER: b"x"}
    assert THREE_OF_FIVE.places(given_) == (b"a", b"", b"", b"d", b"")


@given(st.integers(0, 2**128 - 1), st.integers(1, 5))
def test_every_unit_of_the_fee_goes_to_a_signer(fee: int, count: int) -> None:
    shares = fee_shares(fee, MEMBERS[:count])
    assert sum(share.units for share in shares) == fee
    assert all(share.units for share in shares)
    even = [share.units for share in shares if share.to != MEMBERS[0]]
    assert len(set(even)) <= 1
    assert not even or shares[0].units - even[0] < count


def test_what_does_not_divide_goes_to_the_first() -> None:
    assert fee_shares(11, MEMBERS[:3]) == (
        Payout(MEMBERS[0], 5),
        Payout(MEMBERS[1], 3),
        Payout(MEMBERS[2], 3),
    )
    assert fee_shares(1, MEMBERS[:3]) == (Payout(MEMBERS[0], 1),)
    assert fee_shares(0, MEMBERS[:3]) == ()
