"""The arbiter: an agent that runs the deterministic check again and rules a split.

It decides by what the two sides can show. Evidence counts only if it matches the hashes that
both signed or that stand on chain: the terms in the log, the commitment to the task, and the hash
of the result. The seller has to show the result, since it says to have made one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import anyio
from pydantic_core import from_json

from coase.protocol.effects import Rule
from coase.protocol.errors import CallReverted, ChainUnavailable
from coase.protocol.identity import Identity, keccak256
from coase.protocol.messages import Evidence, commitment, schemas_hash
from coase.protocol.types import Phase

from .checks import fault_in_time

if TYPE_CHECKING:
    from coase.escrow.ports import Settlement
    from coase.protocol.envelope import Message
    from coase.protocol.terms import Terms

log = logging.getLogger(__name__)

POLL_S: Final = 0.4
WAIT_FOR_EVIDENCE_S: Final = 3  # After the answer; both sides repeat theirs until taken.
CASES_MAX: Final = 10_000


@dataclass(slots=True)
class Case:
    """One dispute, and what was shown of it."""

    job_id: bytes
    answered_s: int = 0
    evidence: dict[str, Evidence] = field(default_factory=dict)
    ruled: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """What the check says: the seller's share, and why."""

    to_seller_units: int
    why: str


async def judge_evidence(terms: Terms, deliverable: bytes, shown: list[Evidence]) -> Finding:
    """Return who is right about a result, from evidence that matches ``deliverable``.

    The whole price to the seller if the result fits the output schema that the terms commit to;
    nothing if it does not, or if nobody can show it.
    """
    for evidence in shown:
        result = evidence.result.encode()
        if commitment(bytes.fromhex(evidence.result_salt[2:]), result) != deliverable:
            continue
        fault = await check_result(terms, evidence)
        if fault:
            return Finding(0, fault)
        return Finding(terms.price_units, "the result fits the schema that was agreed")
    return Finding(0, "nobody could show the result whose hash is on chain")


async def check_result(terms: Terms, evidence: Evidence) -> str:
    """Return what is wrong with a result by its schema, or nothing."""
    try:
        schemas = from_json(evidence.input_schema), from_json(evidence.output_schema)
    except ValueError:
        return "the schemas shown are no JSON"
    if schemas_hash(*schemas) != terms.work.schemas:
        return "the schemas shown are not the ones that the terms commit to"
    if terms.work.verification == "none":
        return ""
    return await fault_in_time(evidence.result, evidence.output_schema)


class Arbiter:
    """Rules the disputes in which both sides named this key."""

    def __init__(self, identity: Identity, settlement: Settlement) -> None:
        self.identity, self.settlement = identity, settlement
        self.cases: dict[bytes, Case] = {}
        self.rulings: list[tuple[str, Finding]] = []

    def on_evidence(self, message: Message, evidence: Evidence) -> None:
        """Keep what a side of a dispute shows. The newest of each side counts."""
        terms = evidence.terms.terms()
        if terms.arbiter != self.identity.address:
            return
        if message.sender not in (terms.buyer, terms.seller):
            return
        job_id = terms.digest(self.settlement.domain)
        if job_id not in self.cases and len(self.cases) >= CASES_MAX:
            # Anybody can make up terms and show evidence of them: what is on chain stays.
            idle = next(
                (known for known, old in self.cases.items() if old.ruled or not old.answered_s),
                None,
            )
            if idle is None:
                return
            del self.cases[idle]
        case = self.cases.setdefault(job_id, Case(job_id))
        case.evidence[message.sender] = evidence

    async def run(self) -> None:
        """Watch the chain and rule, until cancelled."""
        block = 0
        while True:
            try:
                events, block = await self.settlement.events(block)
                for event in events:
                    if event.kind == "answered":
                        case = self.cases.setdefault(event.job_id, Case(event.job_id))
                        case.answered_s = event.time_s
                head = await self.settlement.head()
                for case in list(self.cases.values()):
                    waited = head.time_s - case.answered_s >= WAIT_FOR_EVIDENCE_S
                    both = len(case.evidence) == 2
                    if case.answered_s and not case.ruled and case.evidence and (both or waited):
                        await self._rule(case)
            except ChainUnavailable as error:
                log.info("arbiter: %s", error)
            await anyio.sleep(POLL_S)

    async def _rule(self, case: Case) -> None:
        terms = next(iter(case.evidence.values())).terms.terms()
        view = (await self.settlement.jobs([case.job_id]))[case.job_id]
        if view.phase is not Phase.ANSWERED:
            case.ruled = view.phase is Phase.CLOSED
            return
        finding = await judge_evidence(terms, view.deliverable, list(case.evidence.values()))
        why = keccak256(finding.why.encode())
        call = Rule(terms, finding.to_seller_units, 0, why)
        try:
            await self.settlement.perform(
                f"{case.job_id.hex()}:rule@{self.identity.address}", call, self.identity
            )
        except CallReverted as error:
            log.warning("a ruling was refused: %s", error)
        case.ruled = True
        self.rulings.append((case.job_id.hex(), finding))
        log.info("ruled %s: %s", case.job_id.hex()[:16], finding.why)
