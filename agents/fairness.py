"""What a buyer does not sign, whatever the price: terms under which it could not defend itself.

The contract allows windows from a second to a month, no arbiter, and any split for a silent one.
A seller who may choose freely chooses so that rubbish is paid for. These rules hold for every
offer, before any strategy looks at its price.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from coase.protocol.messages import STREAMED
from coase.protocol.types import ZERO_ADDRESS

from .metering import is_counted

if TYPE_CHECKING:
    from coase.protocol.messages import Request
    from coase.protocol.session import Margins
    from coase.protocol.terms import Terms

# Dispute, answer and ruling together: longer than that nobody's money should lie in a quarrel.
QUARREL_MAX_S: Final = 7 * 24 * 3600


def unlockable(terms: Terms, margins: Margins, *, now_ms: int) -> bool:
    """Return whether the lock could not be in time: who cannot be paid holds up who could be."""
    return terms.lock_by_s - now_ms // 1000 <= margins.chain_s


def unfair(terms: Terms, request: Request, margins: Margins, *, now_ms: int) -> str:
    """Return why ``terms`` would leave the buyer without defence, or nothing if they do not."""
    arbitrated = terms.arbiter != ZERO_ADDRESS
    work = terms.work
    streamed = work.settlement in STREAMED  # Who stops paying needs nobody to rule.
    rules: tuple[tuple[bool, str], ...] = (
        (arbitrated or streamed or not request.arbiters, "it names no arbiter"),
        (
            work.settlement != "channel" or work.pricing != "tokens" or is_counted(terms),
            "its tokens cannot be counted here",
        ),
        (not unlockable(terms, margins, now_ms=now_ms), "the time to lock is too short"),
        # Half of it may pass before a withheld result counts as withheld; then the margin. And
        # whatever stood still meanwhile has to come back in time.
        (
            terms.dispute_s >= 2 * margins.chain_s + 1 + margins.halt_s,
            "the time to dispute is too short",
        ),
        (
            not arbitrated or terms.rule_s >= 3 * margins.chain_s + margins.halt_s,
            "the arbiter has too little time",
        ),
        (
            terms.dispute_s + terms.answer_s + terms.rule_s <= QUARREL_MAX_S,
            "a dispute would lock the price for too long",
        ),
        (
            2 * terms.default_to_seller_units <= terms.price_units,
            "a silent arbiter would favour the seller",
        ),
        (2 * terms.bond_units <= terms.price_units, "the bond of a dispute is too high"),
        (
            terms.deliver_by_s - terms.lock_by_s <= request.deliver_within_s,
            "it delivers later than was asked for",
        ),
        (not request.model or work.model in ("", request.model), "it is another model"),
        (
            (work.input_max, work.output_max) == (request.input_max, request.output_max),
            "it meters other amounts than were asked for",
        ),
    )
    return next((why for holds, why in rules if not holds), "")
