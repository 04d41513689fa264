"""A seller's stake: what is free, reserved or on its way out, and what becomes of a deal's slice.

This is the Python twin of the vault contract, rule for rule and refusal for refusal. Nothing here
holds money or knows the time: a backend brings what is stored, the caller and the time of the
block, and gets back what is to be stored.

A deal's slice is reserved when the deal opens and is nobody else's until it is closed. It is lost
by a ruling, or by the seller's own silence: after a delivery by not answering the dispute, after an
acknowledgement of the input by not delivering. Windows are half open, as in the deal itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from coase.protocol.errors import CallReverted
from coase.protocol.terms import ack_digest
from coase.protocol.types import UNITS_MAX, ZERO_BYTES32, How

from .lifecycle import Verify, is_signed_by

if TYPE_CHECKING:
    from coase.protocol.terms import Domain, Terms
    from coase.protocol.types import AgentId

ACK_S: Final = 3 * 24 * 3600
"""How long after ``deliver_by`` the buyer may bring the seller's acknowledgement."""
UNBOND_S: Final = 7 * 24 * 3600
"""How long stake waits between ``Unbond`` and ``Release``: longer than any window for evidence."""


@dataclass(frozen=True, slots=True)
class Deposit:
    """Add to the sender's free stake."""

    units: int


@dataclass(frozen=True, slots=True)
class Allow:
    """Let the escrow of ``token`` keep up to ``max_units`` of the sender's stake reserved."""

    token: str
    max_units: int


@dataclass(frozen=True, slots=True)
class Unbond:
    """Move free stake of the sender to unbonding; the wait begins anew for all of it."""

    units: int


@dataclass(frozen=True, slots=True)
class Release:
    """Pay the sender what is unbonding, once its time has come."""


@dataclass(frozen=True, slots=True)
class CloseSlice:
    """End the slice of a deal that has ended; anybody may send it.

    ``task`` is what the seller's acknowledgement names. It and the signature count only where the
    seller neither delivered nor settled, and then only for a time.
    """

    terms: Terms
    task: bytes = ZERO_BYTES32
    ack_signature: bytes = b""


@dataclass(frozen=True, slots=True)
class WithdrawStake:
    """Pay out what a failed transfer left owed to ``owner``. Anybody may send it."""

    owner: AgentId


StakeCall = Deposit | Allow | Unbond | Release | CloseSlice | WithdrawStake


@dataclass(frozen=True, slots=True)
class Stake:
    """What one seller has in a vault; the first three are all of it."""

    free_units: int = 0
    reserved_units: int = 0
    unbonding_units: int = 0
    unbond_at_s: int = 0

    @property
    def bonded_units(self) -> int:
        """All that the vault holds for the seller."""
        return self.free_units + self.reserved_units + self.unbonding_units


@dataclass(frozen=True, slots=True)
class Allowance:
    """How much of a seller's stake an escrow keeps reserved, and how much it may."""

    reserved_units: int = 0
    max_units: int = 0


@dataclass(frozen=True, slots=True)
class Closed:
    """What closing a slice does."""

    stake: Stake
    allowance: Allowance
    slashed_units: int
    """What goes to the buyer; the rest of the slice is free again."""


NO_STAKE: Final = Stake()
NO_ALLOWANCE: Final = Allowance()


def deposited(stake: Stake, units: int) -> Stake:
    """Return ``stake`` with ``units`` more that are free.

    :raises CallReverted: BadAmount
    """
    if not 0 < units <= UNITS_MAX - stake.bonded_units:
        raise CallReverted("BadAmount", units)
    return replace(stake, free_units=stake.free_units + units)


def allowed(allowance: Allowance, max_units: int) -> Allowance:
    """Return ``allowance`` with another limit; what is reserved stays.

    :raises CallReverted: BadAmount
    """
    if max_units > UNITS_MAX:
        raise CallReverted("BadAmount", max_units)
    return replace(allowance, max_units=max_units)


def unbonded(stake: Stake, units: int, *, owner: str, now_s: int) -> Stake:
    """Return ``stake`` with ``units`` less that are free and more that are unbonding.

    :raises CallReverted: BadAmount, NotEnoughFree
    """
    if units == 0:
        raise CallReverted("BadAmount", units)
    return replace(
        _taken(stake, units, owner),
        unbonding_units=stake.unbonding_units + units,
        unbond_at_s=now_s + UNBOND_S,
    )


def released(stake: Stake, *, owner: str, now_s: int) -> Stake:
    """Return ``stake`` with nothing unbonding any more: that was paid to its owner.

    :raises CallReverted: NothingToRelease, StillUnbonding
    """
    if not stake.unbonding_units:
        raise CallReverted("NothingToRelease", owner)
    if now_s < stake.unbond_at_s:
        raise CallReverted("StillUnbonding", owner, stake.unbond_at_s)
    return replace(stake, unbonding_units=0, unbond_at_s=0)


def reserved(
    stake: Stake, allowance: Allowance, units: int, *, seller: str, escrow: str
) -> tuple[Stake, Allowance]:
    """Return both with a slice of ``units`` more reserved by ``escrow``.

    :raises CallReverted: NotAllowedToReserve, NotEnoughFree
    """
    before, limit = allowance.reserved_units, allowance.max_units
    if units == 0:
        raise CallReverted("BadAmount", units)
    if before + units > limit:
        raise CallReverted("NotAllowedToReserve", seller, escrow, before, limit, units)
    after = _taken(stake, units, seller)
    return (
        replace(after, reserved_units=stake.reserved_units + units),
        replace(allowance, reserved_units=before + units),
    )


def slashed_units(
    call: CloseSlice,
    *,
    how: How,
    penalty_units: int,
    now_s: int,
    domain: Domain,
    verify: Verify = is_signed_by,
) -> int:
    """Return what of the slice of a deal that ended as ``how`` goes to the buyer.

    ``domain`` is the escrow's, in which acknowledgements are signed.

    :raises CallReverted: DealIsOpen, AckNeeded
    """
    terms = call.terms
    job_id = terms.digest(domain)
    match how:
        case How.OPEN:
            raise CallReverted("DealIsOpen", "0x" + job_id.hex())
        case How.RULED:
            return penalty_units
        case How.SILENT_SELLER:
            return terms.stake_units
        case How.UNDELIVERED | How.DECLINED:
            limit_s = terms.deliver_by_s + ACK_S
            if now_s > limit_s:
                return 0
            # The sender is no acknowledgement of his own, not even the seller.
            digest = ack_digest(domain, job_id, call.task)
            if not verify(digest, call.ack_signature, terms.seller):
                raise CallReverted("AckNeeded", "0x" + job_id.hex(), limit_s)
            return terms.stake_units
    return 0


def closed(stake: Stake, allowance: Allowance, *, units: int, slashed: int) -> Closed:
    """Return what is left when a slice of ``units`` is no more and ``slashed`` of it is lost."""
    return Closed(
        stake=replace(
            stake,
            free_units=stake.free_units + units - slashed,
            reserved_units=stake.reserved_units - units,
        ),
        allowance=replace(allowance, reserved_units=allowance.reserved_units - units),
        slashed_units=slashed,
    )


def _taken(stake: Stake, units: int, owner: str) -> Stake:
    if units > stake.free_units:
        raise CallReverted("NotEnoughFree", owner, stake.free_units, units)
    return replace(stake, free_units=stake.free_units - units)
