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

from coase.negotiation.pricing import Tariff, Usage
from coase.protocol.effects import Rule
from coase.protocol.errors import CallReverted, ChainUnavailable
from coase.protocol.identity import Identity, keccak256
from coase.protocol.messages import Evidence, commitment, schemas_hash
from coase.protocol.types import Phase

from .checks import COUNTS, ENDLESS, fault_in_time

if TYPE_CHECKING:
    from collections.abc import Callable

    from coase.escrow.ports import ChainEvent, Settlement
    from coase.protocol.messages import Ruling
    from coase.protocol.terms import Terms
    from coase.protocol.types import AgentId

    from .bench import Bench

log = logging.getLogger(__name__)

POLL_S: Final = 0.4
# After the answer; both sides repeat theirs until taken. A third of the time to rule if that is
# more: whoever was down meanwhile gets the rest of it.
WAIT_FOR_EVIDENCE_S: Final = 3
# A check may take seconds of a processor. Rulings of one pair of parties wait for each other, so
# that nobody's quarrels with itself take all the places.
RULINGS_AT_ONCE: Final = 4
ENDLESS_MAX: Final = 10_000
OVERHEAD_TOKENS: Final = 16
"""What a model may count beyond a token for each byte of its answer, such as the end of it."""


@dataclass(slots=True)
class Case:
    """One dispute that the chain knows, and what was shown of it."""

    job_id: bytes
    answered_s: int = 0
    evidence: dict[AgentId, Evidence] = field(default_factory=dict)
    busy: bool = False
    ruling: tuple[Rule, Finding] | None = None
    """What we found, while others of our panel have yet to agree."""

    @property
    def terms(self) -> Terms:
        """The terms that it is about; only to be asked for once something was shown."""
        return next(iter(self.evidence.values())).terms.terms()


@dataclass(frozen=True, slots=True)
class Finding:
    """What the check says: the seller's share, and why."""

    to_seller_units: int
    why: str


def valid(terms: Terms, deliverable: bytes, evidence: Evidence) -> bool:
    """Return whether ``evidence`` is what both signed: the result on chain, the agreed schemas."""
    result = evidence.result.encode()
    if commitment(bytes.fromhex(evidence.result_salt[2:]), result) != deliverable:
        return False
    try:
        schemas = from_json(evidence.input_schema), from_json(evidence.output_schema)
    except ValueError:
        return False
    return schemas_hash(*schemas) == terms.work.schemas


async def judge_evidence(terms: Terms, deliverable: bytes, shown: list[Evidence]) -> Finding:
    """Return who is right about a result, from evidence that matches what both signed.

    The price to the seller if the result fits the output schema that the terms commit to, or what
    its own count of tokens comes to; nothing if it does not fit, or if nobody can show it. Which
    side showed it does not matter, and what does not match is as if it had not been shown.
    """
    evidence = next((one for one in shown if valid(terms, deliverable, one)), None)
    if evidence is None:
        return Finding(0, "nobody could show the result whose hash is on chain, and its schemas")
    fault = ""
    if terms.work.verification != "none":
        fault = await fault_in_time(evidence.result, evidence.output_schema)
    if fault:
        return Finding(0, fault)
    return Finding(
        worth_units(terms, evidence.result), "the result fits the schema that was agreed"
    )


def worth_units(terms: Terms, result: str) -> int:
    """Return what a good result costs at most: by its own count of tokens where that is metered.

    No count is believed beyond what the terms allow, nor beyond a token for each byte.
    """
    if terms.work.pricing != "tokens":
        return terms.price_units
    try:
        made = from_json(result)
    except ValueError:
        return terms.price_units
    given, written = (made.get(name) if isinstance(made, dict) else None for name in COUNTS)
    if not isinstance(given, int) or not isinstance(written, int) or min(given, written) < 0:
        return terms.price_units
    used = Usage(
        input_tokens=min(given, terms.work.input_max),
        output_tokens=min(written, terms.work.output_max, len(result.encode()) + OVERHEAD_TOKENS),
    )
    tariff = Tariff.of_work(terms.work, price_units=terms.price_units)
    return min(tariff.charge_units(used, cap_units=terms.price_units), terms.price_units)


def penalty_units(terms: Terms, finding: Finding) -> int:
    """Return what a seller loses of its stake: as large a part as it loses of the price.

    Nothing where the check had no end: that is the schema's fault, which both have signed.
    """
    if finding.why == ENDLESS or not terms.price_units:
        return 0
    lost = terms.price_units - finding.to_seller_units
    return terms.stake_units * lost // terms.price_units


class Arbiter:
    """Rules the disputes in which both sides named this key.

    Evidence counts from when the chain shows the dispute that it is about: whoever makes up
    cases fills nothing here. ``forget`` is called with each case that is over.
    """

    def __init__(
        self,
        identity: Identity,
        settlement: Settlement,
        *,
        forget: Callable[[str], object] = lambda case: None,
        bench: Bench | None = None,
    ) -> None:
        self.identity, self.settlement, self._forget = identity, settlement, forget
        self.benches: dict[AgentId, Bench] = {}
        """Our seats on panels, by their address: on the one that is named now, and on earlier ones
        for as long as we run, since deals may name them yet."""
        if bench is not None:
            self.sit(bench)
        self.cases: dict[bytes, Case] = {}
        self.rulings: list[tuple[str, Finding]] = []
        self._endless: dict[bytes, None] = {}
        """Hashes of schemas by which a check did not end; it is not tried twice."""
        self._pairs: set[frozenset[AgentId]] = set()

    def sit(self, bench: Bench) -> None:
        """Take a seat on a panel. Safe to repeat."""
        self.benches.setdefault(bench.address, bench)

    def take(self, sender: AgentId, evidence: Evidence) -> str:
        """Keep what a side shows of a dispute on chain, and return the case; else nothing.

        The newest of each side counts.
        """
        terms = evidence.terms.terms()
        job_id = terms.digest(self.settlement.domain)
        if job_id not in self.cases or terms.arbiter not in self._names():
            return ""
        if sender not in (terms.buyer, terms.seller):
            return ""
        self.cases[job_id].evidence[sender] = evidence
        return job_id.hex()

    def _names(self) -> tuple[AgentId, ...]:
        """Return under which addresses we rule: our own, and those of our panels."""
        return (self.identity.address, *self.benches)

    def ruled(self, sender: AgentId, ruling: Ruling) -> None:
        """Take what another member of our panel has found."""
        if bytes.fromhex(ruling.job_id[2:]) in self.cases:
            for bench in self.benches.values():  # Which of them counts, the job's terms say.
                bench.hear(sender, ruling)

    def recall(self, sender: AgentId, evidence: Evidence) -> None:
        """Take evidence out of the journal: its dispute was on chain when it came."""
        job_id = evidence.terms.terms().digest(self.settlement.domain)
        self.cases.setdefault(job_id, Case(job_id)).evidence[sender] = evidence

    async def run(self) -> None:
        """Watch the chain and rule, until cancelled."""
        block = 0
        async with anyio.create_task_group() as group:
            while True:
                try:
                    events, block = await self.settlement.events(block)
                    for event in events:
                        self._see(event)
                    head = await self.settlement.head()
                    for case in self._due(head.time_s):
                        case.busy = True
                        self._pairs.add(_pair(case))
                        group.start_soon(self._try_to_rule, case)
                except ChainUnavailable as error:
                    log.info("arbiter: %s", error)
                await anyio.sleep(POLL_S)

    def _see(self, event: ChainEvent) -> None:
        if event.kind in ("disputed", "answered"):
            case = self.cases.setdefault(event.job_id, Case(event.job_id))
            if event.kind == "answered":
                case.answered_s = event.time_s
        elif event.kind in ("ruled", "settled"):
            self._close(event.job_id)

    def _close(self, job_id: bytes) -> None:
        for bench in self.benches.values():
            bench.forget(job_id)
        if self.cases.pop(job_id, None) is not None:
            self._forget(job_id.hex())

    def _due(self, now_s: int) -> list[Case]:
        """Return the cases to rule now, the most urgent first, one for each pair of parties."""
        ready = [case for case in self.cases.values() if _ready(case, now_s)]
        ready.sort(key=lambda case: case.answered_s + case.terms.rule_s)
        free = RULINGS_AT_ONCE - len(self._pairs)
        due: dict[frozenset[AgentId], Case] = {}
        for case in ready:
            if len(due) < free and _pair(case) not in self._pairs:
                due.setdefault(_pair(case), case)
        return list(due.values())

    async def _try_to_rule(self, case: Case) -> None:
        pair = _pair(case)
        try:
            await self._rule(case)
        except ChainUnavailable as error:
            log.info("arbiter: %s", error)  # Later: the case stays.
        finally:
            self._pairs.discard(pair)
            case.busy = False

    async def _find(self, case: Case, deliverable: bytes) -> tuple[Rule, Finding]:
        """Check what was shown, and return how we rule, and why."""
        terms = case.terms
        if terms.work.schemas in self._endless:
            finding = Finding(0, ENDLESS)
        else:
            finding = await judge_evidence(terms, deliverable, list(case.evidence.values()))
        if finding.why == ENDLESS and len(self._endless) < ENDLESS_MAX:
            self._endless[terms.work.schemas] = None
        reason = keccak256(finding.why.encode())
        return Rule(terms, finding.to_seller_units, penalty_units(terms, finding), reason), finding

    async def _rule(self, case: Case) -> None:
        terms = case.terms
        view = (await self.settlement.jobs([case.job_id]))[case.job_id]
        if view.phase is not Phase.ANSWERED:
            if view.phase is Phase.CLOSED:
                self._close(case.job_id)
            return
        call, finding = case.ruling or await self._find(case, view.deliverable)
        case.ruling = call, finding
        bench = self.benches.get(terms.arbiter)
        if bench is not None:
            now_s = (await self.settlement.head()).time_s
            if await bench.rule(case.job_id, call, now_s):
                self.rulings.append((case.job_id.hex(), finding))
                self._close(case.job_id)
            return
        try:
            await self.settlement.perform(
                f"{case.job_id.hex()}:rule@{self.identity.address}", call, self.identity
            )
        except CallReverted as error:
            # Too late, or both agreed meanwhile: the chain has its outcome.
            log.info("the ruling of %s was refused: %s", case.job_id.hex()[:16], error)
        else:
            self.rulings.append((case.job_id.hex(), finding))
            log.info("ruled %s: %s", case.job_id.hex()[:16], finding.why)
        self._close(case.job_id)


def _pair(case: Case) -> frozenset[AgentId]:
    terms = case.terms
    return frozenset((terms.buyer, terms.seller))


def _ready(case: Case, now_s: int) -> bool:
    """Return whether all was shown that will be: by both sides, or in the time that they had."""
    if case.busy or not case.answered_s or not case.evidence:
        return False
    wait_s = max(WAIT_FOR_EVIDENCE_S, case.terms.rule_s // 3)
    return len(case.evidence) == 2 or now_s - case.answered_s >= wait_s
