"""How a deal is written down: its records in the journal, and the summary when it is over."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from coase.protocol.calls import agreed_by_call
from coase.protocol.envelope import Message, parse_body
from coase.protocol.messages import Evidence, Request, TermsBody, terms_to_wire
from coase.protocol.session import NO_CHARGE, Charge, Thread
from coase.protocol.states import Role
from coase.protocol.types import How, JobView, Phase

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coase.protocol.terms import Domain
    from coase.protocol.types import AgentId

    from .ports import Record


def summary(thread: Thread) -> bytes:
    """Return what is kept of a deal that is over, as JSON."""
    terms = thread.terms
    return json.dumps(
        {
            "deal": thread.deal,
            "side": thread.side,
            "counterparty": thread.counterparty,
            "request": thread.request_id,
            "capability": thread.request.capability,
            "job_id": thread.job_id.hex(),
            "method": thread.method,
            "state": thread.state,
            "why": thread.why,
            "price_units": terms.price_units if terms is not None else 0,
            "bond_units": terms.bond_units if terms is not None else 0,
            "arbiter": terms.arbiter if terms is not None else "",
            "to_seller_units": thread.view.to_seller_units,
            "to_buyer_units": thread.view.to_buyer_units,
            "how": thread.view.how.name.lower(),
            "usage": thread.result.usage if thread.result is not None else {},
            "result": thread.result.result if thread.result is not None else "",
            "verdict": thread.verdict,
            "history": [
                [e.at_ms, e.state, e.role, e.move, e.price_units, e.tx_hash] for e in thread.history
            ],
            **({"contract": thread.contract} if thread.contract else {}),
            **({"rates": True} if thread.is_contract else {}),
            **charge_to_row(thread.charge),
        },
        separators=(",", ":"),
        ensure_ascii=False,
    ).encode()


def charge_to_row(charge: Charge) -> dict[str, list[str]]:
    """Return what a row says of a charge: nothing where there is none, as rows of old say."""
    return {"charge": [charge.account, charge.reference]} if charge else {}


def charge_of_row(row: Mapping[str, Any]) -> Charge:
    """Return the charge that a row says."""
    return Charge(*row["charge"]) if "charge" in row else NO_CHARGE


def view_to_json(view: JobView, depth_s: int) -> bytes:
    """Return a look at the chain as one line of the journal."""
    return json.dumps(
        [
            int(view.phase),
            view.clock_s,
            view.deliverable.hex(),
            int(view.how),
            str(view.to_seller_units),
            str(view.to_buyer_units),
            view.tx_hash,
            depth_s,
        ]
    ).encode()


def view_from_json(data: bytes) -> tuple[JobView, int]:
    """Return the look and the chain time that a line of the journal holds."""
    phase, clock_s, deliverable, how, to_seller, to_buyer, tx_hash, depth_s = json.loads(data)
    view = JobView(
        phase=Phase(phase),
        clock_s=clock_s,
        deliverable=bytes.fromhex(deliverable),
        how=How(how),
        to_seller_units=int(to_seller),
        to_buyer_units=int(to_buyer),
        tx_hash=tx_hash,
    )
    return view, depth_s


def thread_to_json(thread: Thread) -> bytes:
    """Return what a thread began with."""
    return json.dumps(
        {
            "side": thread.side,
            "counterparty": thread.counterparty,
            "request_id": thread.request_id,
            "request": thread.request.model_dump_json(),
            "secret": thread.secret.hex(),
            "their_key": thread.their_key,
            **_called_to_row(thread),
            **charge_to_row(thread.charge),
        }
    ).encode()


def _called_to_row(thread: Thread) -> dict[str, object]:
    """Return what a row says of a call under a rate contract: all that was agreed there."""
    if not thread.contract:
        return {}
    told = [thread.contract, thread.number, thread.accept_id, terms_to_wire(thread.agreed_terms)]
    return {"called": told}


def message_to_json(message: Message, until_ms: int) -> bytes:
    """Return a message as it was said or heard; one of ours is repeated until ``until_ms``."""
    return json.dumps(
        {
            "kind": message.kind,
            "id": message.id,
            "re": message.re,
            "sent_ms": message.sent_ms,
            "expires_ms": message.expires_ms,
            "until_ms": until_ms,
            "plain": message.plain.decode(),
        },
        separators=(",", ":"),
        ensure_ascii=False,
    ).encode()


def evidence_to_json(message: Message) -> bytes:
    """Return evidence as it was heard from a side of somebody else's deal."""
    row = {"id": message.id, "sender": message.sender, "plain": message.plain.decode()}
    return json.dumps(row, separators=(",", ":"), ensure_ascii=False).encode()


def evidence_from_json(record: Record) -> tuple[AgentId, str, Evidence]:
    """Return who showed evidence, under which id, and what it was."""
    row = json.loads(record.data)
    return row["sender"], row["id"], Evidence.model_validate_json(row["plain"])


def message_from_json(record: Record, thread: Thread) -> tuple[Message, int]:
    """Return the message of a ``said`` or ``heard`` record, and until when it is repeated."""
    row = json.loads(record.data)
    ours = record.kind == "said"
    plain = row["plain"].encode()
    message = Message(
        kind=row["kind"],
        id=row["id"],
        sender=thread.holder if ours else thread.counterparty,
        to=thread.counterparty if ours else thread.holder,
        deal=thread.deal,
        re=row["re"],
        sent_ms=row["sent_ms"],
        expires_ms=row["expires_ms"],
        body=parse_body(row["kind"], plain),
        plain=plain,
    )
    return message, row["until_ms"]


def thread_from_json(record: Record, holder: str, domain: Domain) -> Thread:
    """Return the thread, empty as it began, that a line of the journal opens."""
    row = json.loads(record.data)
    thread = Thread(
        deal=record.deal,
        side=Role(row["side"]),
        holder=holder,
        counterparty=row["counterparty"],
        request_id=row["request_id"],
        request=Request.model_validate_json(row["request"]),
        domain=domain,
        secret=bytes.fromhex(row["secret"]),
        their_key=row["their_key"],
        opened_ms=record.at_ms,
        charge=charge_of_row(row),
    )
    if "called" not in row:
        return thread
    contract, number, accept_id, told = row["called"]
    opened = replace(thread, contract=contract, number=number, accept_id=accept_id)
    return agreed_by_call(opened, TermsBody.model_validate(told).terms(), now_ms=record.at_ms)
