"""Rate contracts: terms that are agreed once, under which a buyer calls for work many times.

A rate contract is a thread whose task is named later: its commitment is zero, and what it is paid
by is no escrow. It holds no place and no money. Each call opens a deal of its own with its task;
its terms follow from the contract and the call alone, so that both sides have the same ones and
nobody has to be asked. A call that is refused, or comes too late, binds nobody.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .errors import Refused
from .identity import keccak256
from .messages import LOCK_BY_MAX_S, RateCall, commitment
from .session import Entry, Thread
from .states import Role, State

if TYPE_CHECKING:
    from .terms import Terms


def call_id(contract: str, number: int) -> str:
    """Return the id of the deal that a call under ``contract``, its deal's id, opens."""
    named = bytes.fromhex(contract) + number.to_bytes(8, "big")
    return keccak256(b"coase/call/v1\0" + named)[:16].hex()


def called(contract: Thread, call: RateCall, *, now_ms: int) -> Thread:
    """Return the deal that ``call`` opens, agreed as the contract says; its task is to be taken.

    Whose call it is was looked at, and whether it can be done is for the seller to say.

    :raises Refused: if the contract does not cover it
    """
    terms, now_s = contract.agreed_terms, now_ms // 1000
    if not contract.is_contract or contract.state is not State.AGREED:
        raise Refused("wrong_state", "there is no rate contract under this id")
    rules = (
        (int(call.price_units) <= terms.price_units, "price_units"),
        (bool(int(call.price_units)) == bool(terms.price_units), "price_units"),
        (call.input_max <= terms.work.input_max, "input_max"),
        (call.output_max <= terms.work.output_max, "output_max"),
        (now_s - 60 <= call.lock_by_s <= now_s + LOCK_BY_MAX_S, "lock_by_s"),
        (call.lock_by_s <= terms.lock_by_s, "lock_by_s"),
    )
    for holds, name in rules:
        if not holds:
            raise Refused("wrong_terms", f"{name} is not what the rate contract allows")
    opened = replace(
        contract,
        deal=call_id(contract.deal, call.number),
        opened_ms=now_ms,
        seller_signature=b"",
        contract=contract.deal,
        number=call.number,
    )
    return agreed_by_call(opened, _terms_of(terms, call), now_ms=now_ms)


def agreed_by_call(opened: Thread, terms: Terms, *, now_ms: int) -> Thread:
    """Return the thread of a call as it begins: agreed, with the terms that follow from it."""
    entry = Entry(now_ms, State.AGREED, Role.BUYER, "accept", terms.price_units)
    job_id = terms.digest(opened.domain)
    return replace(opened, state=State.AGREED, terms=terms, job_id=job_id, history=(entry,))


def _terms_of(terms: Terms, call: RateCall) -> Terms:
    work = replace(
        terms.work,
        task=commitment(bytes.fromhex(call.salt[2:]), call.task.encode()),
        input_max=call.input_max,
        output_max=call.output_max,
    )
    return replace(
        terms,
        price_units=int(call.price_units),
        lock_by_s=call.lock_by_s,
        deliver_by_s=call.lock_by_s + terms.deliver_by_s - terms.lock_by_s,
        work=work,
    )
