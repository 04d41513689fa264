"""Effects: what the core asks to be done, as data. Each has an id and may be done twice.

Calls are the writes to the escrow contract; the wire's and the engine's effects stand below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .terms import Terms
    from .types import AgentId


@dataclass(frozen=True, slots=True)
class Open:
    """Lock the price: the buyer sends it, so only the seller's signature is carried.

    How it is funded (allowance, permit, EIP-3009) is the wallet's choice.
    """

    terms: Terms
    seller_signature: bytes


@dataclass(frozen=True, slots=True)
class Submit:
    """Put the hash of the result on chain; the seller sends it."""

    terms: Terms
    deliverable: bytes


@dataclass(frozen=True, slots=True)
class Settle:
    """End the deal by consent. An empty signature stands for the sender's own."""

    terms: Terms
    deliverable: bytes
    to_seller_units: int
    buyer_signature: bytes
    seller_signature: bytes


@dataclass(frozen=True, slots=True)
class Decline:
    """Give the whole price back before delivery; the seller sends it."""

    terms: Terms


@dataclass(frozen=True, slots=True)
class Dispute:
    """Object to the result with a bond; the buyer sends it."""

    terms: Terms
    evidence: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """Stand by the result with a bond; the seller sends it."""

    terms: Terms
    evidence: bytes


@dataclass(frozen=True, slots=True)
class Rule:
    """Decide the split; the arbiter sends it."""

    terms: Terms
    to_seller_units: int
    penalty_units: int
    evidence: bytes


@dataclass(frozen=True, slots=True)
class Poke:
    """Bring about the outcome of silence; anybody may send it."""

    terms: Terms


@dataclass(frozen=True, slots=True)
class ClaimRefund:
    """The standard's refund at expiry; for a deal it moves nothing. Anybody may send it."""

    job_id: bytes


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Pay out what a failed transfer left owed to ``owner``. Anybody may send it."""

    owner: AgentId


@dataclass(frozen=True, slots=True)
class Cancel:
    """Make sure that these terms are never opened; buyer or seller sends it."""

    terms: Terms


@dataclass(frozen=True, slots=True)
class Invalidate:
    """Cancel up to 256 of the sender's own nonces at once."""

    word: int
    mask: int


Call = (
    Open
    | Submit
    | Settle
    | Decline
    | Dispute
    | Answer
    | Rule
    | Poke
    | ClaimRefund
    | Withdraw
    | Cancel
    | Invalidate
)
