"""The figures of a demonstration, every one of them out of the journal and the chain."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

from coase.protocol.identity import keccak256
from coase.protocol.messages import canonical_json
from coase.protocol.types import units_to_text

from .story import READER, Outcome

CHAIN_MOVES: Final = {
    "working": "open",
    "delivered": "submit",
    "disputed": "dispute",
    "answered": "answer",
}


@dataclass(frozen=True, slots=True)
class Deal:
    """One thread that came to an agreement, or one that did not, as the journal tells it."""

    id: str
    request: str
    capability: str
    buyer: str
    seller: str
    method: str
    state: str
    how: str
    why: str
    asked_units: int
    agreed_units: int
    paid_units: int
    offers: int
    counters: int
    agreed: bool
    disputed: bool
    tokens: int
    result: str
    transactions: tuple[str, ...]
    states: tuple[tuple[str, str, str, int], ...]
    """Each state that it came to, by whose move, and when."""

    def to_json(self) -> dict[str, Any]:
        """Return the deal for ``--json``."""
        return {
            "id": self.id,
            "capability": self.capability,
            "buyer": self.buyer,
            "seller": self.seller,
            "method": self.method,
            "state": self.state,
            "how": self.how,
            "price_asked_units": str(self.asked_units),
            "price_agreed_units": str(self.agreed_units),
            "paid_units": str(self.paid_units),
            "transactions": list(self.transactions),
            "states": [
                {"state": state, "by": by, "move": move, "at_ms": at_ms}
                for state, by, move, at_ms in self.states
            ],
        }


def deals_of(outcome: Outcome) -> list[Deal]:
    """Return the buyers' records of all threads; the sellers' tell the same from their side."""
    deals = []
    for agent, _, data in outcome.summaries:
        row = json.loads(data)
        if row["side"] != "buyer":
            continue
        history = row["history"]
        prices = [price for _, _, _, move, price, _ in history if move == "offer"]
        moves = Counter((role, move) for _, _, role, move, _, _ in history)
        agreed = any(state == "agreed" for _, state, *_ in history)
        deals.append(
            Deal(
                id=row["deal"],
                request=row["request"],
                capability=row["capability"].rpartition("-")[0],
                buyer=outcome.names.get(agent, agent),
                seller=outcome.names.get(row["counterparty"], row["counterparty"]),
                method=row["method"],
                state=row["state"],
                how=row["how"],
                why=row["why"],
                asked_units=prices[0] if prices else 0,
                agreed_units=row["price_units"] if agreed else 0,
                paid_units=row["to_seller_units"],
                offers=moves[("seller", "offer")],
                counters=moves[("buyer", "counter")],
                agreed=agreed,
                disputed=any(state == "disputed" for _, state, *_ in history),
                tokens=int(row["usage"].get("output_tokens", 0)),
                result=row["result"],
                transactions=tuple(
                    dict.fromkeys(tx for *_, tx in history if tx)  # In order, each once.
                ),
                states=tuple((state, by, move, at_ms) for at_ms, state, by, move, *_ in history),
            )
        )
    return deals


def conserved(outcome: Outcome) -> bool:
    """Return whether all units are accounted for.

    The balances of agents and arbiter, what the escrow holds, of which it owes some, what lies in
    channels, and what the faucet has left must add up to what was minted; nobody else may hold any.
    """
    everybody = sum(outcome.after.values()) + outcome.held_units + outcome.bank_units
    everybody += outcome.streamed_units
    return everybody == outcome.supply_units and outcome.held_units >= outcome.owed_units


def digest_of(deals: list[Deal]) -> str:
    """Return a hash of what was dealt: who, what, prices, states and texts, but no times."""
    rows = sorted(
        canonical_json(
            [
                deal.capability,
                deal.buyer,
                deal.seller,
                deal.asked_units,
                deal.agreed_units,
                deal.paid_units,
                deal.state,
                [state for state, *_ in deal.states] if not deal.agreed else deal.how,
                _text(deal.result),
            ]
        )
        for deal in deals
    )
    return keccak256("\n".join(rows).encode()).hex()


def _text(result: str) -> object:
    """Return a result as its content, so that one spelling of JSON is like another."""
    try:
        return json.loads(result)
    except ValueError:
        return result


def report(outcome: Outcome, *, engine: str, model: str) -> dict[str, Any]:
    """Return what ``coase demo --json`` prints."""
    deals = deals_of(outcome)
    agreed = [deal for deal in deals if deal.agreed]
    return {
        "transport": "nats",
        "chain": f"embedded, id {outcome.chain_id}",
        "engine": engine,
        "model": model,
        "agents": len(outcome.names),
        "requests": outcome.asked,
        "offers": sum(deal.offers for deal in deals),
        "counter_offers": sum(deal.counters for deal in deals),
        "agreements": len(agreed),
        "settled": sum(1 for deal in agreed if deal.state == "settled"),
        "refunded": sum(1 for deal in agreed if deal.state == "refunded"),
        "disputed": sum(1 for deal in agreed if deal.disputed),
        "by_escrow": sum(1 for deal in agreed if deal.method == "escrow"),
        "by_channel": sum(1 for deal in agreed if deal.method == "channel"),
        "tokens_generated": sum(deal.tokens for deal in agreed),
        "wall_s": round(outcome.wall_s, 1),
        "digest": digest_of(deals),
        "conserved": conserved(outcome),
        "minted_units": str(outcome.supply_units),
        "failures": outcome.failures,
        "documents": [
            {
                "title": bought.result.title,
                "lines": bought.result.lines,
                "paid": bought.paid,
                "seller": outcome.names.get(bought.seller, bought.seller),
            }
            for bought in sorted(outcome.purchases, key=lambda bought: bought.result.title)
        ],
        "balances": {
            name: {
                "before_units": str(outcome.before[name]),
                "after_units": str(outcome.after[name]),
            }
            for name in sorted(outcome.before)
        },
        "deals": [deal.to_json() for deal in agreed],
    }


def earnings(outcome: Outcome, decimals: int) -> list[tuple[str, str, int, int, str]]:
    """Return for each agent: name, what it sold, deals won, deals paid, and its gain."""
    deals = [deal for deal in deals_of(outcome) if deal.agreed]
    rows = []
    for name in outcome.before:
        sold = [deal for deal in deals if deal.seller == name]
        what = next((deal.capability for deal in sold), "" if name != READER else "(buys)")
        paid = sum(1 for deal in sold if deal.paid_units)
        gain = outcome.after[name] - outcome.before[name]
        text = units_to_text(gain, decimals)
        rows.append((name, what, len(sold), paid, text if gain < 0 else f"+{text}"))
    return sorted(rows, key=lambda row: row[0])
