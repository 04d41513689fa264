"""What a stranger needs to end other people's deals: their terms out of the log, and their limits.

The log carries whole terms but for the work, of which it has the hash. That is all that `poke`
takes, and the job's id still follows from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

from coase.protocol.terms import Terms, Work
from coase.protocol.types import ZERO_BYTES32, How, JobView, Phase

if TYPE_CHECKING:
    from .ports import ChainTerms

OUTCOMES: Final = {
    Phase.WORKING: (How.UNDELIVERED, "the seller did not deliver: all to the buyer"),
    Phase.DELIVERED: (How.SILENT_BUYER, "the buyer stayed silent: all to the seller"),
    Phase.DISPUTED: (How.SILENT_SELLER, "the seller did not answer the dispute: all to the buyer"),
    Phase.ANSWERED: (How.SILENT_ARBITER, "the arbiter did not rule: the split that the terms name"),
}
"""What silence means in each phase that waits for somebody."""


@dataclass(frozen=True)
class HashedWork(Work):
    """Work of which only the hash is known."""

    known_hash: bytes = ZERO_BYTES32

    @cached_property
    def struct_hash(self) -> bytes:
        """The hash that the log tells."""
        return self.known_hash


def terms_in_log(told: ChainTerms) -> Terms:
    """Return the terms that an ``opened`` event tells, good for all calls but an opening."""
    return Terms(
        buyer=told.buyer.lower(),
        seller=told.seller.lower(),
        asset=told.asset.lower(),
        price_units=told.price_units,
        work=HashedWork("", known_hash=told.work_hash),
        lock_by_s=told.lock_by_s,
        deliver_by_s=told.deliver_by_s,
        dispute_s=told.dispute_s,
        nonce=told.nonce,
        arbiter=told.arbiter.lower(),
        bond_units=told.bond_units,
        default_to_seller_units=told.default_to_seller_units,
        answer_s=told.answer_s,
        rule_s=told.rule_s,
        vault=told.vault.lower(),
        stake_units=told.stake_units,
    )


def silence_limit_s(view: JobView, terms: Terms) -> int | None:
    """Return the last instant at which the act that a deal waits for is allowed, by chain time.

    Afterwards anybody may poke it. None if it waits for nobody.
    """
    windows = {
        Phase.WORKING: 0,
        Phase.DELIVERED: terms.dispute_s,
        Phase.DISPUTED: terms.answer_s,
        Phase.ANSWERED: terms.rule_s,
    }
    window_s = windows.get(view.phase)
    return None if window_s is None else view.clock_s + window_s
