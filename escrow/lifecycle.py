"""A deal on chain as a table: (call, phase) -> who, until when, and what becomes of the money.

This is the Python twin of the escrow contract, rule for rule and refusal for refusal, without
plain ERC-8183 jobs; sellers' stakes are in ``stake``. Nothing here holds money or knows the time: a
backend brings the job, the caller and the time of the block, and gets back a ``Step``: the next
job, what to take from whom, what to pay to whom, and what the log says of it.

Windows are half open: an act is allowed at ``now <= limit``, its silence counts at ``now > limit``,
so that at every instant at most one side of a deadline can move.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import Final

from coase.protocol.effects import (
    Answer,
    Cancel,
    ClaimRefund,
    Decline,
    Dispute,
    Open,
    Poke,
    Rule,
    Settle,
    Submit,
)
from coase.protocol.errors import BadSignature, CallReverted
from coase.protocol.identity import keccak256, recover
from coase.protocol.terms import (
    Domain,
    Terms,
    answer_digest,
    delivery_digest,
    dispute_digest,
    ruling_digest,
    settlement_digest,
    word,
)
from coase.protocol.types import UNITS_MAX, ZERO_ADDRESS, ZERO_BYTES32, How, JobView, Phase

SPAN_MAX_S: Final = 30 * 24 * 3600
"""Bounds deliver_by and each window, so that no deal lives longer than 120 days."""

DealCall = Open | Submit | Settle | Decline | Dispute | Answer | Rule | Poke | ClaimRefund | Cancel
"""The calls that are about one deal; the other two, withdraw and invalidate, stand below."""

Verify = Callable[[bytes, bytes, str], bool]
"""(digest, signature, signer) -> whether it is the signer's. A simulator may bring a cheap one."""


class Status(IntEnum):
    """The job's status in the words of ERC-8183; the numbers are the standard's."""

    OPEN = 0
    FUNDED = 1
    SUBMITTED = 2
    COMPLETED = 3
    REJECTED = 4
    EXPIRED = 5


class Who(Enum):
    """Whose consent a call needs: by sending it, or by a signature that somebody else carries."""

    BUYER = "buyer"
    SELLER = "seller"
    ARBITER = "arbiter"


class When(Enum):
    """How a call's time stands to the limit of the phase."""

    ALWAYS = "always"
    ACT = "now <= limit"
    SILENCE = "now > limit"
    EXPIRY = "now >= expires_at"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table."""

    who: tuple[Who, ...]
    when: When
    to: Phase
    how: How = How.OPEN


_BOTH: Final = (Who.BUYER, Who.SELLER)
_ANYBODY: Final = ()

# A call that is not here is refused and changes nothing. Two rows have a rule of their own besides:
# a dispute without a bond goes on to ANSWERED at once, since there is nothing that an answer could
# post; and the seller need not be asked whether he takes the whole price for what he delivered.
TABLE: Final[Mapping[tuple[type[DealCall], Phase], Row]] = {
    (Open, Phase.NONE): Row(_BOTH, When.ACT, Phase.WORKING),
    (Cancel, Phase.NONE): Row(_BOTH, When.ALWAYS, Phase.CANCELLED),  # Either of them.
    (Submit, Phase.WORKING): Row((Who.SELLER,), When.ACT, Phase.DELIVERED),
    (Decline, Phase.WORKING): Row((Who.SELLER,), When.ACT, Phase.CLOSED, How.DECLINED),
    (Dispute, Phase.DELIVERED): Row((Who.BUYER,), When.ACT, Phase.DISPUTED),
    (Answer, Phase.DISPUTED): Row((Who.SELLER,), When.ACT, Phase.ANSWERED),
    (Rule, Phase.ANSWERED): Row((Who.ARBITER,), When.ACT, Phase.CLOSED, How.RULED),
    (Settle, Phase.WORKING): Row(_BOTH, When.ALWAYS, Phase.CLOSED, How.SETTLED),
    (Settle, Phase.DELIVERED): Row(_BOTH, When.ALWAYS, Phase.CLOSED, How.SETTLED),
    (Settle, Phase.DISPUTED): Row(_BOTH, When.ALWAYS, Phase.CLOSED, How.SETTLED),
    (Settle, Phase.ANSWERED): Row(_BOTH, When.ALWAYS, Phase.CLOSED, How.SETTLED),
    # Silence: who was to move did not, and anybody may say so.
    (Poke, Phase.WORKING): Row(_ANYBODY, When.SILENCE, Phase.CLOSED, How.UNDELIVERED),
    (Poke, Phase.DELIVERED): Row(_ANYBODY, When.SILENCE, Phase.CLOSED, How.SILENT_BUYER),
    (Poke, Phase.DISPUTED): Row(_ANYBODY, When.SILENCE, Phase.CLOSED, How.SILENT_SELLER),
    (Poke, Phase.ANSWERED): Row(_ANYBODY, When.SILENCE, Phase.CLOSED, How.SILENT_ARBITER),
    # The standard's refund at expiry marks the job and moves nothing: the rows above still pay.
    (ClaimRefund, Phase.WORKING): Row(_ANYBODY, When.EXPIRY, Phase.WORKING),
    (ClaimRefund, Phase.DELIVERED): Row(_ANYBODY, When.EXPIRY, Phase.DELIVERED),
    (ClaimRefund, Phase.DISPUTED): Row(_ANYBODY, When.EXPIRY, Phase.DISPUTED),
    (ClaimRefund, Phase.ANSWERED): Row(_ANYBODY, When.EXPIRY, Phase.ANSWERED),
}


@dataclass(frozen=True, slots=True)
class Job:
    """What the escrow knows of one deal. Its terms are not stored: every call brings them."""

    phase: Phase = Phase.NONE
    status: Status = Status.OPEN
    seller: str = ZERO_ADDRESS
    expires_at_s: int = 0
    clock_s: int = 0
    """deliver_by while working, then the time of the last step; kept at the end if delivered."""
    price_units: int = 0
    bonds_units: int = 0
    """All that the two sides posted in a dispute, as long as the escrow holds it."""
    penalty_units: int = 0
    deliverable: bytes = ZERO_BYTES32
    """What was submitted, or settled at once; as the log tells it."""
    how: How = How.OPEN
    to_seller_units: int = 0
    to_buyer_units: int = 0

    @property
    def locked_units(self) -> int:
        """What the escrow holds for this deal: price and bonds while it is open, then nothing."""
        return self.price_units + self.bonds_units if self.phase in LIVE else 0

    def view(self, tx_hash: str) -> JobView:
        """Return what the settlement port tells of it."""
        return JobView(
            phase=self.phase,
            clock_s=self.clock_s,
            deliverable=self.deliverable,
            how=self.how,
            to_seller_units=self.to_seller_units,
            to_buyer_units=self.to_buyer_units,
            tx_hash=tx_hash,
        )


LIVE: Final = frozenset({Phase.WORKING, Phase.DELIVERED, Phase.DISPUTED, Phase.ANSWERED})
NO_JOB: Final = Job()


@dataclass(frozen=True, slots=True)
class Pull:
    """Take ``units`` from ``owner``; an EIP-3009 authorisation for it must carry ``nonce``."""

    owner: str
    units: int
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Reserve:
    """Ask ``vault`` to reserve ``units`` of the seller's stake; if it refuses, nothing happens."""

    vault: str
    seller: str
    units: int
    job_id: bytes


@dataclass(frozen=True, slots=True)
class Payout:
    """Pay ``units`` to ``to``, or note that they are owed if the token refuses."""

    to: str
    units: int


@dataclass(frozen=True, slots=True)
class Told:
    """One line of the log; ``evidence`` of a submission is the hash of what was delivered."""

    kind: str
    evidence: bytes = b""
    to_seller_units: int = 0
    to_buyer_units: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """What one call does, all of it or nothing."""

    job: Job
    events: tuple[Told, ...] = ()
    pull: Pull | None = None
    payouts: tuple[Payout, ...] = ()
    reserve: Reserve | None = None


def is_signed_by(digest: bytes, signature: bytes, signer: str) -> bool:
    """Return whether ``signer`` signed ``digest``, as the contract's ECDSA path would say."""
    try:
        return recover(digest, signature) == signer
    except BadSignature:
        return False


def job_id_of(call: DealCall, domain: Domain) -> bytes:
    """Return the id of the deal that ``call`` is about: the digest of its terms."""
    return call.job_id if isinstance(call, ClaimRefund) else call.terms.digest(domain)


def limit_of(job: Job, terms: Terms) -> int:
    """Return the last instant of the act that ``job`` waits for; silence counts after it.

    :raises KeyError: if the job is not open, so that there is nothing to wait for
    """
    window_s = {
        Phase.WORKING: 0,
        Phase.DELIVERED: terms.dispute_s,
        Phase.DISPUTED: terms.answer_s,
        Phase.ANSWERED: terms.rule_s,
    }[job.phase]
    return job.clock_s + window_s


def bond_nonce(job_id: bytes, part: int) -> bytes:
    """Return the EIP-3009 nonce of a bond: ``part`` is 1 for the dispute, 2 for the answer."""
    return keccak256(job_id + word(part))


def nonce_bit(nonce: int) -> tuple[int, int]:
    """Return the word of the seller's bitmap that ``nonce`` lies in, and its bit in there."""
    return nonce >> 8, 1 << (nonce & 0xFF)


def check_owed(owner: str, owed_units: int) -> int:
    """Return what ``withdraw`` pays to ``owner``.

    :raises CallReverted: NothingOwed
    """
    if owed_units == 0:
        raise CallReverted("NothingOwed", owner)
    return owed_units


def apply(
    job: Job,
    call: DealCall,
    *,
    caller: str,
    now_s: int,
    domain: Domain,
    asset: str,
    nonce_used: bool = False,
    signature: bytes = b"",
    verify: Verify = is_signed_by,
) -> Step:
    """Return what ``call`` does to ``job`` in a block at ``now_s``. Changes nothing itself.

    ``caller`` counts as his own signature. ``signature`` is that of the party whose act this is,
    where somebody else carries it: the buyer's on Terms to open or on Dispute, the seller's on
    Delivery or Answer, the arbiter's on Ruling. ``nonce_used`` is the seller's bit for the nonce of
    the terms; whoever performs an ``Open`` sets it.

    :raises CallReverted: with the contract's own error name and values
    """
    job_id = job_id_of(call, domain)
    move = _Move(job, job_id, TABLE.get((type(call), job.phase)), caller, now_s, domain, verify)
    match call:
        case Open():
            return _open(move, call, asset, nonce_used, signature)
        case Submit():
            return _submit(move, call, signature)
        case Settle():
            return _settle(move, call)
        case Decline():
            return _decline(move, call.terms)
        case Dispute():
            return _dispute(move, call, signature)
        case Answer():
            return _answer(move, call, signature)
        case Rule():
            return _rule(move, call, signature)
        case Poke():
            return _poke(move, call.terms)
        case ClaimRefund():
            return _claim_refund(move)
        case Cancel():
            return _cancel(move, call.terms)


@dataclass(frozen=True, slots=True)
class _Move:
    """One call on one job, and the checks that several calls share."""

    job: Job
    job_id: bytes
    found: Row | None
    caller: str
    now_s: int
    domain: Domain
    verify: Verify

    def refuse(self, error: str, *values: object) -> CallReverted:
        return CallReverted(error, "0x" + self.job_id.hex(), *values)

    def row(self) -> Row:
        if self.found is None:
            raise self.refuse("WrongPhase", int(self.job.phase) + int(self.job.how))
        return self.found

    def row_by_status(self, *statuses: Status) -> Row:
        """The two calls of the standard look at its status, and name it when they refuse."""
        if self.found is None or self.job.status not in statuses:
            raise self.refuse("WrongStatus", int(self.job.status))
        return self.found

    def in_time(self, limit_s: int) -> None:
        if self.now_s > limit_s:
            raise self.refuse("TooLate", limit_s)

    def consent(self, signer: str, digest: bytes, signature: bytes) -> None:
        if self.caller != signer and not self.verify(digest, signature, signer):
            raise CallReverted("BadSignature", signer)

    def close(self, terms: Terms, row: Row, to_seller: int, told: tuple[Told, ...] = ()) -> Step:
        """The one way out: the split of the price, and the bonds to whom they belong."""
        job, price, bond = self.job, terms.price_units, terms.bond_units
        to_buyer = price - to_seller
        buyer_bond = bond if job.phase in (Phase.DISPUTED, Phase.ANSWERED) else 0
        seller_bond = bond if job.phase is Phase.ANSWERED else 0
        fee = 0
        if row.how is How.RULED:
            # Of two bonds one is the arbiter's fee. Each side pays of it what it lost of the price;
            # the buyer's part is rounded down, the dust goes with the seller's.
            fee = bond
            buyer_bond = bond * to_buyer // price
            seller_bond = bond - buyer_bond
        status = Status.COMPLETED if to_seller else Status.REJECTED
        after = replace(
            job,
            phase=row.to,
            status=job.status if job.status is Status.EXPIRED else status,
            clock_s=job.clock_s if job.phase is Phase.DELIVERED else 0,
            bonds_units=0,
            how=row.how,
            to_seller_units=to_seller,
            to_buyer_units=to_buyer,
        )
        payouts = (
            Payout(terms.seller, to_seller + seller_bond),
            Payout(terms.buyer, to_buyer + buyer_bond),
            Payout(terms.arbiter, fee),
        )
        return Step(
            job=after,
            events=(*told, Told("settled", to_seller_units=to_seller, to_buyer_units=to_buyer)),
            payouts=tuple(payout for payout in payouts if payout.units),
        )


def check_terms(terms: Terms, *, now_s: int, escrow: str, asset: str) -> None:
    """Return if an escrow of ``asset`` at address ``escrow`` could open ``terms`` at ``now_s``.

    Signatures, the nonce and ``lock_by_s`` are not looked at.

    :raises CallReverted: with the name of the first rule that they break
    """
    buyer, seller, arbiter = terms.buyer, terms.seller, terms.arbiter
    price, bond = terms.price_units, terms.bond_units
    if terms.asset != asset:
        raise CallReverted("WrongAsset", terms.asset, asset)
    if not 0 < price <= UNITS_MAX:
        raise CallReverted("BadPrice", price)
    if (
        ZERO_ADDRESS in (buyer, seller)
        or escrow in (buyer, seller, arbiter)
        or len({buyer, seller, arbiter}) != 3
    ):
        raise CallReverted("BadParties", buyer, seller, arbiter)
    if terms.default_to_seller_units > price:
        raise CallReverted("SplitAbovePrice", terms.default_to_seller_units, price)
    if bond > price or (arbiter == ZERO_ADDRESS and bond):
        raise CallReverted("BadBond", bond, price, arbiter)
    # Without an arbiter a garbage delivery would be a free way round the penalty.
    stake, staked = terms.stake_units, terms.vault != ZERO_ADDRESS
    if staked != bool(stake) or stake > UNITS_MAX or (arbiter == ZERO_ADDRESS and stake):
        raise CallReverted("BadStake", terms.vault, stake, arbiter)
    if not terms.lock_by_s < terms.deliver_by_s <= now_s + SPAN_MAX_S:
        raise CallReverted("BadTimes", terms.lock_by_s, terms.deliver_by_s)
    windows = (terms.dispute_s, terms.answer_s, terms.rule_s)
    needed = windows if arbiter != ZERO_ADDRESS else windows[:1]
    if max(windows) > SPAN_MAX_S or not all(needed):
        raise CallReverted("BadWindows", *windows)


def _open(m: _Move, call: Open, asset: str, nonce_used: bool, buyer_signature: bytes) -> Step:
    terms = call.terms
    check_terms(terms, now_s=m.now_s, escrow=m.domain.contract, asset=asset)
    m.in_time(terms.lock_by_s)
    m.consent(terms.buyer, m.job_id, buyer_signature)
    m.consent(terms.seller, m.job_id, call.seller_signature)
    if m.found is None:
        raise m.refuse("JobExists")
    if nonce_used:
        raise CallReverted("NonceUsed", terms.seller, terms.nonce)
    job = Job(
        phase=m.found.to,
        status=Status.FUNDED,
        seller=terms.seller,
        expires_at_s=terms.expires_at_s,
        clock_s=terms.deliver_by_s,
        price_units=terms.price_units,
    )
    stake = terms.stake_units
    return Step(
        job,
        (Told("opened"),),
        Pull(terms.buyer, terms.price_units, m.job_id),
        reserve=Reserve(terms.vault, terms.seller, stake, m.job_id) if stake else None,
    )


def _cancel(m: _Move, terms: Terms) -> Step:
    if m.caller not in (terms.buyer, terms.seller):
        raise m.refuse("NotAllowed", m.caller)
    if m.found is None:
        raise m.refuse("JobExists")
    return Step(replace(m.job, phase=m.found.to, status=Status.REJECTED))


def _submit(m: _Move, call: Submit, signature: bytes) -> Step:
    # With a signature it is the contract's ``deliver``, without one the standard's ``submit``.
    if signature:
        m.row()
    row = m.row_by_status(Status.FUNDED)
    if not signature and m.caller != m.job.seller:
        raise m.refuse("NotAllowed", m.caller)
    m.in_time(m.job.clock_s)
    if signature:
        digest = delivery_digest(m.domain, m.job_id, call.deliverable)
        m.consent(call.terms.seller, digest, signature)
    job = replace(
        m.job,
        phase=row.to,
        status=Status.SUBMITTED,
        clock_s=m.now_s,
        deliverable=call.deliverable,
    )
    return Step(job, (Told("submitted", call.deliverable),))


def _decline(m: _Move, terms: Terms) -> Step:
    row = m.row()
    if m.caller != terms.seller:
        raise m.refuse("NotAllowed", m.caller)
    m.in_time(m.job.clock_s)
    return m.close(terms, row, 0)


def _settle(m: _Move, call: Settle) -> Step:
    terms, to_seller = call.terms, call.to_seller_units
    row = m.row()
    if m.job.status is Status.EXPIRED:
        raise m.refuse("WrongStatus", int(m.job.status))
    if to_seller > terms.price_units:
        raise CallReverted("SplitAbovePrice", to_seller, terms.price_units)
    digest = settlement_digest(m.domain, m.job_id, call.deliverable, to_seller)
    m.consent(terms.buyer, digest, call.buyer_signature)
    working = m.job.phase is Phase.WORKING
    if working or to_seller < terms.price_units:
        m.consent(terms.seller, digest, call.seller_signature)
    if not (working and to_seller):
        return m.close(terms, row, to_seller)
    # Paid work was delivered, if only just now. The contract logs its hash without storing it.
    delivered = replace(m.job, phase=Phase.DELIVERED, clock_s=m.now_s, deliverable=call.deliverable)
    told = (Told("submitted", call.deliverable),)
    return replace(m, job=delivered).close(terms, row, to_seller, told)


def _dispute(m: _Move, call: Dispute, signature: bytes) -> Step:
    terms = call.terms
    row = m.row()
    if terms.arbiter == ZERO_ADDRESS:
        raise m.refuse("NoArbiter")
    m.in_time(limit_of(m.job, terms))
    m.consent(terms.buyer, dispute_digest(m.domain, m.job_id, call.evidence), signature)
    bond = terms.bond_units
    job = replace(
        m.job,
        phase=row.to if bond else Phase.ANSWERED,
        clock_s=m.now_s,
        bonds_units=bond,
    )
    pull = Pull(terms.buyer, bond, bond_nonce(m.job_id, 1)) if bond else None
    return Step(job, (Told("disputed", call.evidence),), pull)


def _answer(m: _Move, call: Answer, signature: bytes) -> Step:
    terms = call.terms
    row = m.row()
    m.in_time(limit_of(m.job, terms))
    m.consent(terms.seller, answer_digest(m.domain, m.job_id, call.evidence), signature)
    job = replace(
        m.job, phase=row.to, clock_s=m.now_s, bonds_units=m.job.bonds_units + terms.bond_units
    )
    pull = Pull(terms.seller, terms.bond_units, bond_nonce(m.job_id, 2))
    return Step(job, (Told("answered", call.evidence),), pull)


def _rule(m: _Move, call: Rule, signature: bytes) -> Step:
    terms, to_seller, penalty = call.terms, call.to_seller_units, call.penalty_units
    row = m.row()
    m.in_time(limit_of(m.job, terms))
    if to_seller > terms.price_units:
        raise CallReverted("SplitAbovePrice", to_seller, terms.price_units)
    if penalty > terms.stake_units:
        raise CallReverted("PenaltyAboveStake", penalty, terms.stake_units)
    digest = ruling_digest(m.domain, m.job_id, to_seller, penalty, call.evidence)
    m.consent(terms.arbiter, digest, signature)
    told = Told("ruled", call.evidence, to_seller)
    ruled = replace(m.job, penalty_units=penalty)
    return replace(m, job=ruled).close(terms, row, to_seller, (told,))


def _poke(m: _Move, terms: Terms) -> Step:
    row = m.row()
    limit_s = limit_of(m.job, terms)
    if m.now_s <= limit_s:
        raise m.refuse("TooEarly", limit_s)
    to_seller = {
        How.UNDELIVERED: 0,
        How.SILENT_BUYER: terms.price_units,
        How.SILENT_SELLER: 0,
        How.SILENT_ARBITER: terms.default_to_seller_units,
    }[row.how]
    return m.close(terms, row, to_seller)


def _claim_refund(m: _Move) -> Step:
    row = m.row_by_status(Status.FUNDED, Status.SUBMITTED)
    if m.now_s < m.job.expires_at_s:
        raise m.refuse("TooEarly", m.job.expires_at_s)
    return Step(replace(m.job, phase=row.to, status=Status.EXPIRED))
