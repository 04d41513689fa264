"""How a party's money reaches the escrow: what the contract is given beside a call, signed.

Kinds 0, 1 and 2 are the contract's. Signing is deterministic, so this is pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from coase.protocol.terms import Domain, Terms, permit_digest, receive_digest

from .lifecycle import bond_nonce

if TYPE_CHECKING:
    from coase.protocol.identity import Identity

VALID_AFTER_S: Final = 0
"""An authorisation is good at once: the token wants a time that has passed."""


class Purpose(IntEnum):
    """What is paid: an authorisation for one is good for nothing else."""

    PRICE = 0
    DISPUTE_BOND = 1
    ANSWER_BOND = 2


@dataclass(frozen=True, slots=True)
class Funding:
    """The tuple of that name in the contract's ABI."""

    kind: int
    valid_after_s: int = 0
    deadline_s: int = 0
    signature: bytes = b""

    def as_tuple(self) -> tuple[int, int, int, bytes]:
        """Return it as the ABI encodes it."""
        return self.kind, self.valid_after_s, self.deadline_s, self.signature


BY_ALLOWANCE: Final = Funding(0)
"""The escrow may draw already, or there is nothing to draw."""


def authorization_nonce(job_id: bytes, purpose: Purpose) -> bytes:
    """Return the nonce that binds an EIP-3009 authorisation to one payment of one deal."""
    return job_id if purpose is Purpose.PRICE else bond_nonce(job_id, int(purpose))


def deadline_of(terms: Terms, purpose: Purpose) -> int:
    """Return the first second at which the signature is no longer needed.

    The price is locked by ``lock_by`` or not at all; a bond is posted before the deal expires.
    """
    return (terms.lock_by_s if purpose is Purpose.PRICE else terms.expires_at_s) + 1


def by_authorization(
    identity: Identity,
    token: Domain,
    *,
    escrow: str,
    units: int,
    job_id: bytes,
    purpose: Purpose,
    deadline_s: int,
) -> Funding:
    """Return ``identity``'s EIP-3009 authorisation for this payment of this deal and no other."""
    digest = receive_digest(
        token,
        identity.address,
        escrow,
        units,
        VALID_AFTER_S,
        deadline_s,
        authorization_nonce(job_id, purpose),
    )
    return Funding(2, VALID_AFTER_S, deadline_s, identity.sign(digest))


def by_permit(
    identity: Identity, token: Domain, *, escrow: str, units: int, nonce: int, deadline_s: int
) -> Funding:
    """Return ``identity``'s EIP-2612 permit. ``nonce`` is the token's next one for that owner."""
    digest = permit_digest(token, identity.address, escrow, units, nonce, deadline_s)
    return Funding(1, 0, deadline_s, identity.sign(digest))
