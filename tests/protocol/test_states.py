"""The tables of states, every cell of them, against a second spelling of the same rules."""

from __future__ import annotations

from itertools import product

import pytest

from coase.escrow.lifecycle import TABLE as ON_CHAIN
from coase.protocol.effects import Poke
from coase.protocol.errors import LocalProtocolError, RemoteProtocolError
from coase.protocol.messages import BODIES
from coase.protocol.states import (
    BOUND,
    DEAL,
    REQUEST,
    SILENCE,
    TERMINAL,
    THREAD,
    RequestState,
    Role,
    State,
    advance,
)
from coase.protocol.types import Phase

# state: who says what -> next state. What is not here is forbidden.
BY_WORD = """
requested  seller:offer=offered    clock:reply_by=lapsed
offered    buyer:counter=countered buyer:accept=accepted buyer:reject=rejected
offered    buyer:withdraw=rejected seller:withdraw=rejected clock:valid_until=lapsed
countered  seller:offer=offered    seller:reject=rejected seller:withdraw=rejected
countered  buyer:withdraw=rejected clock:valid_until=lapsed
accepted   seller:agreed=agreed    seller:withdraw=lapsed seller:nack=lapsed clock:agree_by=lapsed
agreed     clock:lock_by=lapsed
"""
# What is said of a deal that binds moves no state.
SAID_OF_A_DEAL = ("buyer:task", "seller:result", "buyer:settle")
BY_CHAIN = {
    "none": "agreed",
    "working": "locked",
    "delivered": "delivered",
    "disputed": "disputed",
    "answered": "answered",
    "paid": "settled",
    "refunded": "refunded",
    "cancelled": "lapsed",
}
ALL_MOVES = sorted(
    {move for _, _, move in (*THREAD, *DEAL["escrow"])} | set(BODIES) | {"unheard of", ""}
)


def expected() -> dict[tuple[State, Role, str], State]:
    rows = {}
    for line in BY_WORD.split("\n"):
        state, *moves = line.split() or [""]
        for move in moves:
            (role, name), after = move.split("=")[0].split(":"), move.split("=")[1]
            rows[(State(state), Role(role), name)] = State(after)
    for state in (State.AGREED, State.LOCKED, State.DELIVERED, State.DISPUTED, State.ANSWERED):
        for said in SAID_OF_A_DEAL:
            role, name = said.split(":")
            rows[(state, Role(role), name)] = state
        for name, after in BY_CHAIN.items():
            rows[(state, Role.CHAIN, name)] = State(after)
    return rows


def test_the_tables_are_exactly_these() -> None:
    assert {**THREAD, **DEAL["escrow"]} == expected()
    assert not THREAD.keys() & DEAL["escrow"].keys()


@pytest.mark.parametrize(("state", "role"), list(product(State, Role)))
def test_every_cell_moves_or_names_who_broke_the_rule(state: State, role: Role) -> None:
    rows = expected()
    for move in ALL_MOVES:
        after = rows.get((state, role, move))
        for ours, blame in ((True, LocalProtocolError), (False, RemoteProtocolError)):
            if after is not None:
                assert advance(state, role, move, ours=ours) is after
                continue
            with pytest.raises(blame, match=f"{role} may not '{move}' while the deal is {state}"):
                advance(state, role, move, ours=ours)


@pytest.mark.parametrize("state", sorted(set(State) - TERMINAL))
def test_every_state_that_is_not_the_end_says_what_silence_does(state: State) -> None:
    silence = SILENCE[state]
    assert silence.who
    assert silence.by
    assert silence.outcome
    by_clock = [row for row in expected() if row[0] is state and row[1] is Role.CLOCK]
    if silence.call:
        # Anybody may bring it about on chain, where the money is.
        assert silence.call == "poke"
        phase = {"locked": Phase.WORKING}.get(state) or Phase[state.name]
        assert ON_CHAIN[(Poke, phase)].who == ()
    else:
        assert [row[2] for row in by_clock] == [silence.by]
        assert expected()[by_clock[0]] in TERMINAL


def test_nothing_follows_the_end() -> None:
    assert not [row for row in expected() if row[0] in TERMINAL]
    assert set(SILENCE) == set(State) - TERMINAL
    assert not set(BOUND) & TERMINAL


def test_the_end_can_be_reached_from_everywhere_without_a_word() -> None:
    for state in set(State) - TERMINAL:
        reached = {state}
        for _ in State:
            reached |= {
                after
                for (before, role, _), after in expected().items()
                if before in reached and role in (Role.CLOCK, Role.CHAIN)
            }
        assert reached & TERMINAL, state


def test_a_request_is_awarded_or_lapses() -> None:
    requested = RequestState.REQUESTED
    assert REQUEST == {
        (requested, Role.SELLER, "offer"): requested,
        (requested, Role.SELLER, "agreed"): RequestState.AWARDED,
        (requested, Role.CLOCK, "reply_by"): RequestState.LAPSED,
    }
