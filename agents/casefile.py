"""The whole file of a deal: what was agreed, said, shown and ruled, from journal and chain."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from coase.protocol.errors import CoaseError, ConfigurationError
from coase.protocol.messages import Request, terms_to_wire
from coase.protocol.session import evidence_hash, limit_s
from coase.protocol.states import BOUND, Role, silence_of
from coase.protocol.terms import Domain
from coase.protocol.types import ZERO_ADDRESS

from .memory import Memory
from .ports import Record, SeededChance

if TYPE_CHECKING:
    from pathlib import Path

    from coase.escrow.ports import ChainEvent, Settlement
    from coase.protocol.session import Thread

BUSY_MAX_S: Final = 5


@dataclass(frozen=True, slots=True)
class Said:
    """One message of the deal, and what is signed by the other side that it came."""

    at_ms: int
    ours: bool
    kind: str
    id: str
    re: str
    answered_by: tuple[str, ...]
    """Messages of its addressee that name it: each is signed, and says that it was taken."""


def read_deal(path: Path, agent: str, deal: str) -> tuple[Thread, list[Record]]:
    """Return a deal and its records out of a journal that another process may be writing.

    :raises ConfigurationError: if the journal cannot be read, or holds no such deal of ``agent``
    """
    query = (
        "SELECT agent, deal, kind, at_ms, data FROM records"
        " WHERE agent = ? AND deal = ? ORDER BY seq"
    )
    try:
        address = f"{path.resolve().as_uri()}?mode=ro"
        connection = sqlite3.connect(address, uri=True, timeout=BUSY_MAX_S)
        try:
            rows = connection.execute(query, (agent, deal)).fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise ConfigurationError(f"no journal can be read at {path}: {error}") from error
    records = [Record(r[0], r[1], r[2], r[3], bytes(r[4])) for r in rows]
    if not records or records[0].kind != "thread":
        raise ConfigurationError(f"{path} holds no deal {deal} of {agent}")
    request = Request.model_validate_json(json.loads(records[0].data)["request"])
    domain = Domain(request.chain_id, request.escrow)
    memory = Memory(agent, SeededChance(b""), domain=domain, encode=lambda *_, **__: b"")
    try:
        memory.replay(records, now_ms=records[-1].at_ms)
    except CoaseError as error:
        raise ConfigurationError(f"the records of {deal} in {path} do not follow: {error}") from (
            error
        )
    return memory.threads[deal], records


def messages_of(records: list[Record]) -> list[Said]:
    """Return what was said and heard, in order, each with what answered it."""
    rows: list[tuple[Record, dict[str, Any]]] = [
        (record, json.loads(record.data)) for record in records if record.kind in ("said", "heard")
    ]
    answers: dict[tuple[str, str], list[str]] = {}
    for record, row in rows:
        if row["re"]:
            answers.setdefault((record.kind, row["re"]), []).append(row["id"])
    other = {"said": "heard", "heard": "said"}
    return [
        Said(
            at_ms=record.at_ms,
            ours=record.kind == "said",
            kind=row["kind"],
            id=row["id"],
            re=row["re"],
            answered_by=tuple(answers.get((other[record.kind], row["id"]), ())),
        )
        for record, row in rows
    ]


def case_file(thread: Thread, records: list[Record]) -> dict[str, Any]:
    """Return everything that a side has of a deal, as a document of JSON values.

    Salts, task and result are in it: whoever is shown it can prove what was sent.
    """
    document: dict[str, Any] = {
        "deal": thread.deal,
        "side": thread.side.value,
        "agent": thread.holder,
        "counterparty": thread.counterparty,
        "capability": thread.request.capability,
        "state": thread.state.value,
        "why": thread.why,
        "verdict": thread.verdict,
        "messages": [
            {
                "at_ms": said.at_ms,
                "by": "us" if said.ours else "them",
                "kind": said.kind,
                "id": said.id,
                "re": said.re,
                "answered_by": list(said.answered_by),
            }
            for said in messages_of(records)
        ],
    }
    if thread.terms is None:
        return document
    terms, task, result = thread.terms, thread.task, thread.result
    document |= {
        "job_id": thread.job_id.hex(),
        "terms": terms_to_wire(terms),
        "arbitrated": terms.arbiter != ZERO_ADDRESS,
        "seller_signature": "0x" + thread.seller_signature.hex(),
        "hashes": {
            "terms": "0x" + terms.digest(thread.domain).hex(),
            "task": "0x" + terms.work.task.hex(),
            "schemas": "0x" + terms.work.schemas.hex(),
            "result": "0x" + thread.deliverable.hex() if result is not None else "",
            "on_chain": "0x" + thread.view.deliverable.hex() if thread.view.deliverable else "",
            "evidence": "0x" + evidence_hash(thread).hex() if thread.job_id else "",
        },
        "evidence": {
            "task_salt": task.salt if task is not None else "",
            "task": task.task if task is not None else "",
            "result_salt": result.salt if result is not None else "",
            "result": result.result if result is not None else "",
            "asked_units": str(result.to_seller_units) if result is not None else "0",
            "usage": dict(result.usage) if result is not None else {},
        },
    }
    return document


def waiting_for(thread: Thread) -> dict[str, Any]:
    """Return who must act, until when by chain time, and what silence means; empty if over."""
    limit = limit_s(thread)
    if thread.state not in BOUND or limit is None:
        return {}
    silence = silence_of(thread.state, thread.method)
    mine = silence.who == ("buyer" if thread.side is Role.BUYER else "seller")
    return {
        "who": "you" if mine else silence.who,
        "until_s": limit,
        "if_silent": silence.outcome,
    }


async def on_chain(settlement: Settlement, job_id: bytes, from_block: int = 0) -> dict[str, Any]:
    """Return what the chain says of a deal: every event, and how it was closed.

    :raises ChainUnavailable: if the chain does not answer
    """
    events, _ = await settlement.events(from_block)
    view = (await settlement.jobs([job_id]))[job_id]
    mine = [event for event in events if event.job_id == job_id]
    ruling = next((event for event in mine if event.kind == "ruled"), None)
    return {
        "phase": view.phase.name.lower(),
        "how": view.how.name.lower(),
        "to_seller_units": str(view.to_seller_units),
        "to_buyer_units": str(view.to_buyer_units),
        "events": [_told(event) for event in mine],
        "ruling": None if ruling is None else _told(ruling),
    }


def _told(event: ChainEvent) -> dict[str, Any]:
    return {
        "kind": event.kind,
        "block": event.block,
        "time_s": event.time_s,
        "tx_hash": event.tx_hash,
        "evidence": "0x" + event.evidence.hex() if event.evidence else "",
        "to_seller_units": str(event.to_seller_units),
        "to_buyer_units": str(event.to_buyer_units),
    }
