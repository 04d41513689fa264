"""The bench: members of one panel, who rule together without a meeting.

Each member checks a case by itself and signs what it finds. It tells the others until the case is
over; who holds as many signatures of one ruling as the panel asks for brings it to the chain. One
is first by turns, so that no two pay for it unless the first is away.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from coase.protocol.errors import BadSignature, CallReverted
from coase.protocol.identity import require_signer
from coase.protocol.terms import ruling_digest

if TYPE_CHECKING:
    from collections.abc import Callable

    from coase.escrow.ports import Panel
    from coase.protocol.effects import Rule
    from coase.protocol.identity import Identity
    from coase.protocol.messages import Ruling
    from coase.protocol.types import AgentId

log = logging.getLogger(__name__)

TURN_S: Final = 3
"""How long each member waits for the one before it to bring a ruling."""
CASES_MAX: Final = 1_000
RULINGS_MAX: Final = 16
"""Different rulings of one case that are remembered: as many as a panel has members."""

Said = tuple[int, int, bytes]
"""What a ruling says: to the seller, the penalty, and the hash of its reason."""


@dataclass(slots=True)
class _Bench:
    """One case: who signed what."""

    signed: dict[Said, dict[AgentId, bytes]] = field(default_factory=dict)
    ours: Rule | None = None
    since_s: int = 0


class Bench:
    """One member's seat on its panel. ``tell`` says a ruling to another member."""

    def __init__(
        self,
        identity: Identity,
        panel: Panel,
        *,
        tell: Callable[[AgentId, bytes, dict[str, object]], object],
    ) -> None:
        self.identity, self.panel, self._tell = identity, panel, tell
        self._cases: dict[bytes, _Bench] = {}

    @property
    def address(self) -> AgentId:
        """What terms name as their arbiter."""
        return self.panel.address

    def hear(self, sender: AgentId, ruling: Ruling) -> bool:
        """Take another member's signed ruling; return whether it is one."""
        if sender not in self.panel.constitution.members:
            return False
        job_id, signature = bytes.fromhex(ruling.job_id[2:]), bytes.fromhex(ruling.signature[2:])
        said = (int(ruling.to_seller_units), int(ruling.penalty_units), _bytes(ruling.evidence))
        try:
            require_signer(ruling_digest(self.panel.domain, job_id, *said), signature, sender)
        except BadSignature:
            return False
        case = self._case(job_id)
        if case is None or (said not in case.signed and len(case.signed) >= RULINGS_MAX):
            return False
        case.signed.setdefault(said, {})[sender] = signature
        return True

    def _case(self, job_id: bytes) -> _Bench | None:
        if job_id not in self._cases and len(self._cases) >= CASES_MAX:
            return None
        return self._cases.setdefault(job_id, _Bench())

    async def rule(self, job_id: bytes, ruling: Rule, now_s: int) -> bool:
        """Sign a ruling, tell the others, and bring it to the chain if it is our turn.

        Returns whether the case is over for us; until then it is called again. The same case is
        ruled alike each time.

        :raises ChainUnavailable: if it cannot be told whether it went through
        """
        case = self._case(job_id)
        if case is None:
            return False
        ruling = case.ours = case.ours or ruling
        case.since_s = case.since_s or now_s
        said = (ruling.to_seller_units, ruling.penalty_units, ruling.evidence)
        signature = self.identity.sign(ruling_digest(self.panel.domain, job_id, *said))
        signed = case.signed.setdefault(said, {})
        signed[self.identity.address] = signature
        for member in self.panel.constitution.members:
            if member != self.identity.address:
                self._tell(member, job_id, _body(job_id, said, signature))
        if len(signed) < self.panel.constitution.threshold:
            return False
        if now_s < case.since_s + self._turn(job_id) * TURN_S:
            return False
        effect_id = f"{job_id.hex()}:rule:{ruling.to_seller_units}@{self.identity.address}"
        try:
            await self.panel.rule(effect_id, ruling, dict(signed), self.identity)
        except CallReverted as error:
            # Another member was first, or both sides agreed: the chain has its outcome.
            log.info("the ruling of %s was refused: %s", job_id.hex()[:16], error)
        return True

    def forget(self, job_id: bytes) -> None:
        """Forget a case that is over."""
        self._cases.pop(job_id, None)

    def _turn(self, job_id: bytes) -> int:
        """Return how many members come before us in this case; another first in each case."""
        members = self.panel.constitution.members
        place = members.index(self.identity.address)
        return (place - int.from_bytes(job_id[:4], "big")) % len(members)


def _body(job_id: bytes, said: Said, signature: bytes) -> dict[str, object]:
    to_seller_units, penalty_units, evidence = said
    return {
        "job_id": "0x" + job_id.hex(),
        "to_seller_units": str(to_seller_units),
        "penalty_units": str(penalty_units),
        "evidence": "0x" + evidence.hex(),
        "signature": "0x" + signature.hex(),
    }


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text[2:])
