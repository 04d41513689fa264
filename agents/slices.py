"""The slices of stakes that a desk's deals hold: remembered when a deal ends, closed soon after.

A slice is the part of a seller's stake that one deal has reserved. Closing it frees it, or gives it
to the buyer where the deal's end says so; anybody may. A buyer whose seller took the task and then
fell silent brings the seller's own signature that it had it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from coase.escrow.stake import ACK_S, CloseSlice
from coase.protocol.messages import TermsBody, terms_to_wire
from coase.protocol.states import Role
from coase.protocol.types import ZERO_BYTES32, How

from .ports import Record

if TYPE_CHECKING:
    from coase.protocol.session import Thread
    from coase.protocol.terms import Terms
    from coase.protocol.types import AgentId

    from .steps import Step

_SILENT: Final = (How.UNDELIVERED, How.DECLINED)


@dataclass(frozen=True, slots=True)
class Slice:
    """One that is not closed yet, as far as we know."""

    key: str
    """Under which the journal holds it."""
    job_id: bytes
    call: CloseSlice
    from_s: int
    """From when on it can be closed by us: a seller's own silence is the buyer's to bring first."""


@dataclass(slots=True)
class Slices:
    """All of one desk."""

    me: AgentId
    open: dict[bytes, Slice] = field(default_factory=dict)

    def ended(self, thread: Thread, step: Step, *, now_ms: int) -> None:
        """Remember the slice of a deal that is over and was open on chain."""
        terms = thread.terms
        if terms is None or not terms.stake_units or thread.view.how is How.OPEN:
            return
        silent = thread.view.how in _SILENT
        ack = thread.ack if silent and thread.side is Role.BUYER else b""
        from_s = terms.deliver_by_s + ACK_S + 1 if silent and not ack else 0
        row = {
            "terms": terms_to_wire(terms),
            "job": thread.job_id.hex(),
            "ack": ack.hex(),
            "from_s": from_s,
        }
        record = Record(
            self.me, f"slice:{thread.job_id.hex()}", "slice", now_ms, json.dumps(row).encode()
        )
        step.records.append(record)
        self.recall(record)

    def recall(self, record: Record) -> None:
        """Take in one line of the journal."""
        row = json.loads(record.data)
        job_id = bytes.fromhex(row["job"])
        terms = TermsBody.model_validate_json(json.dumps(row["terms"])).terms()
        call = _call(terms, bytes.fromhex(row["ack"]))
        self.open[job_id] = Slice(record.deal, job_id, call, row["from_s"])

    def closed(self, job_id: bytes, step: Step) -> None:
        """Forget a slice that is no more."""
        known = self.open.pop(job_id, None)
        if known is not None:
            step.closed.append((known.key, b""))


def _call(terms: Terms, ack: bytes) -> CloseSlice:
    return CloseSlice(terms, terms.work.task if ack else ZERO_BYTES32, ack)
