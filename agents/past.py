"""What came of a purchase in the past: told by the journal when memory has forgotten it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coase.protocol.errors import DealFailed

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Past:
    """A request of ours that is over: its one good result, or why there is none."""

    result: str
    seller: str
    deal: str
    price_units: int
    paid_units: int
    usage: dict[str, int]
    failure: DealFailed | None


def recall(summaries: Sequence[bytes]) -> Past:
    """Return what came of a request whose deals ended as ``summaries`` say."""
    rows: list[dict[str, Any]] = [json.loads(summary) for summary in summaries]
    rows = [row for row in rows if row["side"] == "buyer"]
    # At most one was accepted; the others were turned down or lapsed, and have no job.
    chosen = next((row for row in rows if row["job_id"]), None)
    if chosen is None:
        failure = DealFailed("lapsed", "nobody made an acceptable offer")
        return Past("", "", "", 0, 0, {}, failure)
    failed: DealFailed | None = None
    if chosen["verdict"] != "good":
        why = f"the result was refused: {chosen['verdict']}" if chosen["verdict"] else chosen["why"]
        failed = DealFailed(chosen["state"], why, deal_id=chosen["deal"])
    return Past(
        result=chosen["result"],
        seller=chosen["counterparty"],
        deal=chosen["deal"],
        price_units=chosen["price_units"],
        paid_units=chosen["to_seller_units"],
        usage=chosen["usage"],
        failure=failed,
    )
