"""The table of a seller's stake, cell by cell, at every edge of its windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coase.escrow.stake import (
    ACK_S,
    NO_STAKE,
    UNBOND_S,
    Allowance,
    CloseSlice,
    Stake,
    allowed,
    closed,
    deposited,
    released,
    reserved,
    slashed_units,
    unbonded,
)
from coase.protocol.errors import CallReverted
from coase.protocol.identity import Identity, keccak256
from coase.protocol.terms import Domain, Terms, Work, ack_digest
from coase.protocol.types import UNITS_MAX, How

if TYPE_CHECKING:
    from collections.abc import Callable

DOMAIN = Domain(31337, "0x" + "e5" * 20)
BUYER, SELLER = (Identity(keccak256(name)) for name in (b"buyer", b"seller"))
INPUT = keccak256(b"the input")
TERMS = Terms(
    buyer=BUYER.address,
    seller=SELLER.address,
    asset="0x" + "70" * 20,
    price_units=100,
    work=Work("inference-00000000"),
    lock_by_s=1000,
    deliver_by_s=2000,
    dispute_s=30,
    nonce=1,
    vault="0x" + "7a" * 20,
    stake_units=60,
)
LIMIT_S = TERMS.deliver_by_s + ACK_S
JOB_ID = TERMS.digest(DOMAIN)
ACKED = CloseSlice(TERMS, INPUT, SELLER.sign(ack_digest(DOMAIN, JOB_ID, INPUT)))
BARE = CloseSlice(TERMS)
OTHER = Domain(1, DOMAIN.contract)
FALSE_ACKS = {
    "none": BARE,
    "the buyer's": CloseSlice(TERMS, INPUT, BUYER.sign(ack_digest(DOMAIN, JOB_ID, INPUT))),
    "of another input": CloseSlice(TERMS, keccak256(b"other"), ACKED.ack_signature),
    "of another chain": CloseSlice(TERMS, INPUT, SELLER.sign(ack_digest(OTHER, JOB_ID, INPUT))),
    "of another deal": CloseSlice(TERMS, INPUT, SELLER.sign(ack_digest(DOMAIN, INPUT, INPUT))),
    "cut short": CloseSlice(TERMS, INPUT, ACKED.ack_signature[:-1]),
}


def lost(call: CloseSlice, how: How, *, now_s: int = LIMIT_S, penalty: int = 25) -> int:
    return slashed_units(call, how=how, penalty_units=penalty, now_s=now_s, domain=DOMAIN)


def error_of(act: Callable[[], object]) -> tuple[object, ...]:
    with pytest.raises(CallReverted) as caught:
        act()
    return caught.value.error, *caught.value.values


@pytest.mark.parametrize(
    ("how", "units"),
    [
        (How.SETTLED, 0),
        (How.SILENT_BUYER, 0),
        (How.SILENT_SELLER, 60),
        (How.RULED, 25),
        (How.SILENT_ARBITER, 0),
    ],
)
@pytest.mark.parametrize("call", [BARE, ACKED])
@pytest.mark.parametrize("now_s", [0, LIMIT_S, LIMIT_S + 1])
def test_most_ends_ask_for_no_acknowledgement(
    how: How, units: int, call: CloseSlice, now_s: int
) -> None:
    assert lost(call, how, now_s=now_s) == units


@pytest.mark.parametrize("how", [How.UNDELIVERED, How.DECLINED])
def test_only_acknowledged_silence_costs_and_only_in_time(how: How) -> None:
    assert lost(ACKED, how, now_s=0) == lost(ACKED, how) == 60
    assert lost(ACKED, how, now_s=LIMIT_S + 1) == 0
    for call in FALSE_ACKS.values():
        assert error_of(lambda call=call: lost(call, how)) == (  # type: ignore[misc]
            "AckNeeded",
            "0x" + JOB_ID.hex(),
            LIMIT_S,
        )
        assert lost(call, how, now_s=LIMIT_S + 1) == 0


@pytest.mark.parametrize("now_s", [0, LIMIT_S + 1])
def test_an_open_deal_keeps_its_slice(now_s: int) -> None:
    assert error_of(lambda: lost(ACKED, How.OPEN, now_s=now_s)) == (
        "DealIsOpen",
        "0x" + JOB_ID.hex(),
    )


def test_refusals_carry_what_the_contract_tells() -> None:
    stake, allowance = Stake(10, 20, 5, 7), Allowance(20, 30)
    cases: dict[tuple[object, ...], Callable[[], object]] = {
        ("BadAmount", 0): lambda: deposited(stake, 0),
        ("BadAmount", UNITS_MAX - 34): lambda: deposited(stake, UNITS_MAX - 34),
        ("BadAmount", UNITS_MAX + 1): lambda: allowed(allowance, UNITS_MAX + 1),
        ("NotEnoughFree", "s", 10, 11): lambda: unbonded(stake, 11, owner="s", now_s=0),
        ("NothingToRelease", "s"): lambda: released(NO_STAKE, owner="s", now_s=0),
        ("StillUnbonding", "s", 7): lambda: released(stake, owner="s", now_s=6),
        ("NotAllowedToReserve", "s", "e", 20, 30, 11): lambda: reserved(
            stake, allowance, 11, seller="s", escrow="e"
        ),
        ("NotAllowedToReserve", "s", "e", 20, 19, 1): lambda: reserved(
            stake, Allowance(20, 19), 1, seller="s", escrow="e"
        ),
    }
    for told, act in cases.items():
        assert error_of(act) == told
    assert error_of(lambda: unbonded(stake, 0, owner="s", now_s=0)) == ("BadAmount", 0)
    assert error_of(lambda: reserved(stake, allowance, 0, seller="s", escrow="e"))[0] == "BadAmount"
    # Allowed first, free second: as the contract looks.
    poor = Stake(1, 20)
    assert error_of(lambda: reserved(poor, allowance, 2, seller="s", escrow="e")) == (
        "NotEnoughFree",
        "s",
        1,
        2,
    )
    assert deposited(stake, UNITS_MAX - 35).bonded_units == UNITS_MAX
    assert released(stake, owner="s", now_s=7) == Stake(10, 20)


def test_unbonding_again_makes_all_of_it_wait_again() -> None:
    first = unbonded(Stake(10), 4, owner="s", now_s=100)
    second = unbonded(first, 1, owner="s", now_s=200)
    assert first == Stake(6, 0, 4, 100 + UNBOND_S)
    assert second == Stake(5, 0, 5, 200 + UNBOND_S)


units_of = st.integers(0, 1000)


@given(units_of, units_of, units_of, st.data())
def test_nothing_is_made_or_lost(
    free: int, before: int, unbonding: int, data: st.DataObject
) -> None:
    """Reserved and closed again, a stake has lost what was slashed and nothing else."""
    stake, allowance = Stake(free, before, unbonding, 5), Allowance(before, 2000)
    if not free:
        return
    units = data.draw(st.integers(1, free))
    slashed = data.draw(st.integers(0, units))
    during, kept = reserved(stake, allowance, units, seller="s", escrow="e")
    assert during.bonded_units == stake.bonded_units
    assert during.reserved_units - stake.reserved_units == units
    after = closed(during, kept, units=units, slashed=slashed)
    assert after.stake == Stake(free - slashed, before, unbonding, 5)
    assert after.allowance == allowance
    assert after.slashed_units == slashed
