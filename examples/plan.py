"""Work in many pieces: three texts are summarised by whoever sells that, and then made one.

Run it beside ``coase up`` and a seller::

    python examples/plan.py
"""

from __future__ import annotations

import anyio

from coase.agents import Buyer
from coase.agents.wares import Summarise, Summary

TEXTS = (
    "A lighthouse was long the favourite example of what no market can provide.",
    "Then somebody looked at who had built them, and at who had paid for it.",
    "For two centuries most of them had been built and run for profit.",
)


async def main() -> None:
    """Buy all pieces within one budget, and show the receipt for them."""
    async with Buyer("editor", budget="1", engine=None) as buyer:
        sellers = buyer.market("summarise", returns=Summary)
        plan = buyer.plan(sellers, budget="0.5", max_price="0.05", within_s=100)
        notes = await plan.map([Summarise(text=text) for text in TEXTS])
        whole = await plan.reduce(
            notes.results, lambda some: Summarise(text=" ".join(note.summary for note in some))
        )
        receipt = plan.receipt()
        receipt.check()
        print(f"{whole.summary if whole else 'nothing'}\n{notes} texts, {len(receipt.parts)} deals")
        print(f"paid {buyer.money(receipt.total_units)}, receipt {receipt.root}")


if __name__ == "__main__":
    anyio.run(main)
