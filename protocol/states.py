"""The three tables of states: every legal move of a request, a thread and a deal is a row here.

Both sides run the same tables over the same history, so they cannot disagree on where they are.
A move that is not a row is an error that names who made it and leaves the state as it was.
Every state that is not terminal has a deadline, and ``SILENCE`` says what its passing means.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from .errors import LocalProtocolError, RemoteProtocolError
from .types import Phase


class Role(StrEnum):
    """Who makes a move: a side of the deal, the arbiter's chain, or the clock."""

    BUYER = "buyer"
    SELLER = "seller"
    CHAIN = "chain"
    CLOCK = "clock"


class RequestState(StrEnum):
    """Where a buyer's request stands."""

    REQUESTED = "requested"
    AWARDED = "awarded"
    LAPSED = "lapsed"


class State(StrEnum):
    """Where a thread, and from ``agreed`` on the deal, stands."""

    REQUESTED = "requested"
    OFFERED = "offered"
    COUNTERED = "countered"
    ACCEPTED = "accepted"
    AGREED = "agreed"
    LOCKED = "locked"
    DELIVERED = "delivered"
    DISPUTED = "disputed"
    ANSWERED = "answered"
    SETTLED = "settled"
    REFUNDED = "refunded"
    LAPSED = "lapsed"
    REJECTED = "rejected"


TERMINAL: Final = frozenset((State.SETTLED, State.REFUNDED, State.LAPSED, State.REJECTED))
BOUND: Final = frozenset(
    (State.AGREED, State.LOCKED, State.DELIVERED, State.DISPUTED, State.ANSWERED)
)
"""States in which both have signed; only the chain or its silence ends them."""

REQUEST: Final[dict[tuple[RequestState, Role, str], RequestState]] = {
    (RequestState.REQUESTED, Role.SELLER, "offer"): RequestState.REQUESTED,
    (RequestState.REQUESTED, Role.SELLER, "agreed"): RequestState.AWARDED,
    (RequestState.REQUESTED, Role.CLOCK, "reply_by"): RequestState.LAPSED,
}

THREAD: Final[dict[tuple[State, Role, str], State]] = {
    (State.REQUESTED, Role.SELLER, "offer"): State.OFFERED,
    (State.REQUESTED, Role.CLOCK, "reply_by"): State.LAPSED,
    (State.OFFERED, Role.BUYER, "counter"): State.COUNTERED,
    (State.OFFERED, Role.BUYER, "accept"): State.ACCEPTED,
    (State.OFFERED, Role.BUYER, "reject"): State.REJECTED,
    (State.OFFERED, Role.BUYER, "withdraw"): State.REJECTED,
    (State.OFFERED, Role.SELLER, "withdraw"): State.REJECTED,
    (State.OFFERED, Role.CLOCK, "valid_until"): State.LAPSED,
    (State.COUNTERED, Role.SELLER, "offer"): State.OFFERED,
    (State.COUNTERED, Role.SELLER, "reject"): State.REJECTED,
    (State.COUNTERED, Role.SELLER, "withdraw"): State.REJECTED,
    (State.COUNTERED, Role.BUYER, "withdraw"): State.REJECTED,
    (State.COUNTERED, Role.CLOCK, "valid_until"): State.LAPSED,
    (State.ACCEPTED, Role.SELLER, "agreed"): State.AGREED,
    (State.ACCEPTED, Role.SELLER, "withdraw"): State.LAPSED,
    (State.ACCEPTED, Role.SELLER, "nack"): State.LAPSED,
    (State.ACCEPTED, Role.CLOCK, "agree_by"): State.LAPSED,
}

_ON_CHAIN: Final = {
    Phase.WORKING: State.LOCKED,
    Phase.DELIVERED: State.DELIVERED,
    Phase.DISPUTED: State.DISPUTED,
    Phase.ANSWERED: State.ANSWERED,
}


def _deal_rows() -> dict[tuple[State, Role, str], State]:
    """Write out the rows of a deal whose money is in the escrow.

    The chain is read as a level, not as a stream of events, since streams drop. Between two
    looks it may have gone on by several steps, or back by a reorganisation, so each chain state
    may follow each other one.

    Each side looks in its own time, so what is said once the deal binds moves no state and is
    good in all of them: a task may come before its seller has seen the lock, and a result after
    its buyer has disputed that there is none.
    """
    rows: dict[tuple[State, Role, str], State] = {
        (State.AGREED, Role.CLOCK, "lock_by"): State.LAPSED,
    }
    for before in sorted(BOUND):
        rows[(before, Role.BUYER, "task")] = before
        rows[(before, Role.SELLER, "result")] = before
        rows[(before, Role.BUYER, "settle")] = before
        rows[(before, Role.CHAIN, "cancelled")] = State.LAPSED
        for phase, after in _ON_CHAIN.items():
            rows[(before, Role.CHAIN, phase.name.lower())] = after
        rows[(before, Role.CHAIN, "none")] = State.AGREED
        rows[(before, Role.CHAIN, "paid")] = State.SETTLED
        rows[(before, Role.CHAIN, "refunded")] = State.REFUNDED
    return rows


def _stream_rows() -> dict[tuple[State, Role, str], State]:
    """Write out the rows of a deal without an escrow: paid chunk by chunk, or not at all.

    *Locked* means here: the channel holds the price, as deep as its holder trusts, and nobody is
    taking it out. There is no *disputed*; the remedy of either side is to stop, and what was paid
    by then is paid. So a deal that is broken off ends as settled if anything was paid, and
    otherwise as refunded.
    """
    rows: dict[tuple[State, Role, str], State] = {
        (State.AGREED, Role.BUYER, "task"): State.AGREED,
        (State.AGREED, Role.BUYER, "call"): State.AGREED,
        (State.AGREED, Role.CHAIN, "working"): State.LOCKED,
        (State.AGREED, Role.CLOCK, "lock_by"): State.LAPSED,
        (State.LOCKED, Role.SELLER, "chunk"): State.LOCKED,
        (State.LOCKED, Role.SELLER, "result"): State.DELIVERED,
        (State.LOCKED, Role.CLOCK, "deliver_by"): State.REFUNDED,
        (State.DELIVERED, Role.BUYER, "settle"): State.DELIVERED,
        (State.DELIVERED, Role.SELLER, "ack"): State.SETTLED,
        (State.DELIVERED, Role.CLOCK, "pay_by"): State.REFUNDED,
    }
    for before in (State.LOCKED, State.DELIVERED):
        rows[(before, Role.BUYER, "task")] = before
        rows[(before, Role.BUYER, "call")] = before
        rows[(before, Role.BUYER, "voucher")] = before
    for before in (State.AGREED, State.LOCKED, State.DELIVERED):
        for role in (Role.BUYER, Role.SELLER):
            rows[(before, role, "withdraw")] = (
                State.LAPSED if before is State.AGREED else State.REFUNDED
            )
    return rows


DEAL: Final[dict[str, dict[tuple[State, Role, str], State]]] = {
    "escrow": _deal_rows(),
    "channel": _stream_rows(),
    "none": _stream_rows(),
}
"""One table per settlement method. ``x402`` has no deal of ours: a plain HTTP caller pays it."""


@dataclass(frozen=True, slots=True)
class Silence:
    """What happens when whoever must act in a state does not."""

    who: str
    by: str
    outcome: str
    call: str
    """What anybody may do to bring the outcome about; empty where the clock alone does it."""


SILENCE: Final[dict[State, Silence]] = {
    State.REQUESTED: Silence("sellers", "reply_by", "the request lapses; nobody owes", ""),
    State.OFFERED: Silence("buyer", "valid_until", "the offer lapses", ""),
    State.COUNTERED: Silence("seller", "valid_until", "the counter-offer lapses", ""),
    State.ACCEPTED: Silence("seller", "agree_by", "lapses; counted against the seller", ""),
    State.AGREED: Silence("buyer", "lock_by", "lapses; counted against the buyer", ""),
    State.LOCKED: Silence("seller", "deliver_by", "the buyer is refunded in full", "poke"),
    State.DELIVERED: Silence(
        "buyer", "submitted + dispute window", "the seller is paid in full", "poke"
    ),
    State.DISPUTED: Silence(
        "seller", "disputed + answer window", "the buyer is refunded in full", "poke"
    ),
    State.ANSWERED: Silence(
        "arbiter", "answered + ruling window", "the split that the terms name", "poke"
    ),
}


STREAM_SILENCE: Final[dict[State, Silence]] = {
    State.AGREED: Silence("buyer", "lock_by", "lapses; counted against the buyer", ""),
    State.LOCKED: Silence("seller", "deliver_by", "what was not paid is not owed", ""),
    State.DELIVERED: Silence(
        "buyer", "deliver_by + dispute window", "what was not paid is not owed", ""
    ),
}
"""The same for the methods without an escrow, from *agreed* on."""


def silence_of(state: State, method: str) -> Silence:
    """Return what silence means in a state of a deal that is settled by ``method``."""
    table = SILENCE if method == "escrow" else SILENCE | STREAM_SILENCE
    return table[state]


def advance(state: State, role: Role, move: str, *, method: str = "escrow", ours: bool) -> State:
    """Return the state after ``move``.

    :raises LocalProtocolError: if it is no row and ``ours`` says that we made the move
    :raises RemoteProtocolError: if it is no row and the counterparty made it
    """
    after = THREAD.get((state, role, move)) or DEAL.get(method, {}).get((state, role, move))
    if after is None:
        error = LocalProtocolError if ours else RemoteProtocolError
        raise error(f"{role} may not {move!r} while the deal is {state}")
    return after
