"""The keeper: ends every deal of an escrow that silence has ended, whoever's it is.

A node pokes its own deals. If both sides are away, their money waits, and nobody but a stranger
looks after it: this one. It reads the escrow's log, needs no broker, and pays only for gas.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import anyio

from coase.escrow.advice import explained
from coase.escrow.keeping import OUTCOMES, silence_limit_s, terms_in_log
from coase.escrow.stake import ACK_S, CloseSlice
from coase.protocol.effects import Poke
from coase.protocol.errors import CallReverted, ChainUnavailable
from coase.protocol.types import How, Phase

from .ports import Record

if TYPE_CHECKING:
    from collections.abc import Callable

    from coase.escrow.ports import ChainEvent, Receipt, Settlement, StakeRegistry
    from coase.protocol.identity import Identity
    from coase.protocol.terms import Terms
    from coase.protocol.types import JobView

    from .ports import Journal

log = logging.getLogger(__name__)

GRACE_S: Final = 10  # The parties' own nodes are to pay for their deals while they are there.
POLL_S: Final = 2.0
POKES_AT_ONCE: Final = 16  # One key's transactions; a block takes some hundreds.
AGAIN_AFTER_S: Final = 60  # By chain time, after a refusal: somebody was quicker, most often.


@dataclass(frozen=True, slots=True)
class Poked:
    """One deal that the keeper tried to end."""

    job_id: str
    phase: str
    outcome: str
    late_s: int
    """How long its time had passed."""
    tx_hash: str
    gas: int
    refused: str = ""
    """Why the escrow did not take it; empty if it did."""


class Keeper:
    """Pokes what may be poked, for an escrow, from one key.

    ``grace_s`` is how long after its time a deal is left to its own parties.
    """

    def __init__(
        self,
        settlement: Settlement,
        identity: Identity,
        journal: Journal,
        *,
        now_ms: Callable[[], int],
        grace_s: int = GRACE_S,
        from_block: int = 0,
        stake: StakeRegistry | None = None,
    ) -> None:
        self.stake = stake
        """The vault whose slices it closes, if there is one."""
        self._slices: dict[bytes, tuple[Terms, int]] = {}
        self.settlement, self.identity, self.journal = settlement, identity, journal
        self.open: dict[bytes, Terms] = {}
        """The deals that are not over, as far as the log is read."""
        self.seen_s = 0
        self._now_ms, self._grace_s = now_ms, grace_s
        self._block = from_block
        self._not_before_s: dict[bytes, int] = {}

    async def look(self) -> list[Poked]:
        """Read what is new in the log, poke everything that is due, and return what was done.

        Returns when each is in a block or was refused. Safe to repeat, also after a crash: what
        was sent before it is found again under its id.

        :raises ChainUnavailable: if the chain does not answer; what was done is in the journal
        """
        events, self._block = await self.settlement.events(self._block)
        for event in events:
            self._see(event)
        head = await self.settlement.head()
        self.seen_s = head.time_s
        views = await self.settlement.jobs(list(self.open))
        due: list[tuple[bytes, JobView, int]] = []
        for job_id, view in views.items():
            if view.phase in (Phase.NONE, Phase.CLOSED, Phase.CANCELLED):
                if view.phase is not Phase.NONE:  # Not yet, or no more, at the depth we trust.
                    self._keep_slice(job_id, view, head.time_s)
                    self._forget(job_id)
                continue
            limit_s = silence_limit_s(view, self.open[job_id])
            if limit_s is None or head.time_s <= limit_s + self._grace_s:
                continue
            if head.time_s >= self._not_before_s.get(job_id, 0):
                due.append((job_id, view, head.time_s - limit_s))
        return await self._poke_all(due) + await self._close_slices(head.time_s)

    def _keep_slice(self, job_id: bytes, view: JobView, now_s: int) -> None:
        """Remember the stake of a deal that is over; a silent seller's is its buyer's to claim."""
        terms = self.open[job_id]
        if self.stake is None or not terms.stake_units or terms.vault != self.stake.vault:
            return
        silent = view.how in (How.UNDELIVERED, How.DECLINED)
        from_s = terms.deliver_by_s + ACK_S + 1 if silent else now_s + self._grace_s
        self._slices[job_id] = (terms, from_s)

    async def _close_slices(self, now_s: int) -> list[Poked]:
        """Free what ended deals still hold of sellers' stakes."""
        done: list[Poked] = []
        for job_id, (terms, from_s) in list(self._slices.items()):
            if self.stake is None or now_s < from_s:
                continue
            if not await self.stake.slice_units(job_id):
                del self._slices[job_id]
                continue
            effect_id, receipt, refused = f"{job_id.hex()}:slice@{self.identity.address}", None, ""
            try:
                receipt = await self.stake.perform(effect_id, CloseSlice(terms), self.identity)
                del self._slices[job_id]
            except CallReverted as error:
                refused = explained(error)
                self._slices[job_id] = (terms, now_s + AGAIN_AFTER_S)
            poked = Poked(
                job_id=job_id.hex(),
                phase="over",
                outcome="what it held of the seller's stake is free, or the buyer's",
                late_s=now_s - from_s,
                tx_hash=receipt.tx_hash if receipt is not None else "",
                gas=receipt.gas if receipt is not None else 0,
                refused=refused,
            )
            done.append(poked)
            if receipt is not None:
                self._write(poked)
        return done

    async def run(self, tell: Callable[[Poked], None]) -> None:
        """Look and poke until cancelled; ``tell`` hears of each poke."""
        while True:
            try:
                for poked in await self.look():
                    tell(poked)
            except ChainUnavailable as error:
                log.warning("keeper: %s", error)
            await anyio.sleep(POLL_S)

    def _see(self, event: ChainEvent) -> None:
        if event.terms is not None:
            terms = terms_in_log(event.terms)
            if terms.digest(self.settlement.domain) == event.job_id:
                self.open[event.job_id] = terms
        elif event.kind == "settled" and event.job_id in self.open:
            # Its view may lie some blocks deeper, or a fork may undo this: the views decide.
            self._not_before_s[event.job_id] = event.time_s + AGAIN_AFTER_S

    def _forget(self, job_id: bytes) -> None:
        self.open.pop(job_id, None)
        self._not_before_s.pop(job_id, None)

    async def _poke_all(self, due: list[tuple[bytes, JobView, int]]) -> list[Poked]:
        done: list[Poked] = []
        failed: list[ChainUnavailable] = []
        places = anyio.Semaphore(POKES_AT_ONCE)

        async def poke(job_id: bytes, view: JobView, late_s: int) -> None:
            async with places:
                try:
                    done.append(await self._poke(job_id, view, late_s))
                except ChainUnavailable as error:
                    failed.append(error)

        async with anyio.create_task_group() as group:
            for job_id, view, late_s in due:
                group.start_soon(poke, job_id, view, late_s)
        if failed and not done:
            raise failed[0]
        return sorted(done, key=lambda poked: poked.job_id)

    async def _poke(self, job_id: bytes, view: JobView, late_s: int) -> Poked:
        # The phase is part of the id: what silence means in the next one is another call.
        effect_id = f"{job_id.hex()}:poke:{view.phase.name.lower()}@{self.identity.address}"
        receipt: Receipt | None = None
        refused = ""
        self._not_before_s[job_id] = self.seen_s + AGAIN_AFTER_S
        try:
            receipt = await self.settlement.perform(
                effect_id, Poke(self.open[job_id]), self.identity
            )
        except CallReverted as error:
            refused = explained(error)
        poked = Poked(
            job_id=job_id.hex(),
            phase=view.phase.name.lower(),
            outcome=OUTCOMES[view.phase][1],
            late_s=late_s,
            tx_hash=receipt.tx_hash if receipt is not None else "",
            gas=receipt.gas if receipt is not None else 0,
            refused=refused,
        )
        if receipt is not None:
            self._write(poked)
        return poked

    def _write(self, poked: Poked) -> None:
        data = json.dumps(
            {"phase": poked.phase, "outcome": poked.outcome, "tx": poked.tx_hash, "gas": poked.gas}
        ).encode()
        record = Record(self.identity.address, poked.job_id, "poked", self._now_ms(), data)
        self.journal.append([record])
        self.journal.close_deals(self.identity.address, [(poked.job_id, b"")])
