"""A buyer in about twenty lines: it hires whoever summarises best for the money.

Run it beside ``coase up`` and a seller::

    python examples/buyer.py
"""

from __future__ import annotations

import anyio

from coase.agents import Agent, DealFailed, joined
from coase.agents.wares import Summarise, Summary

TEXT = (
    "A lighthouse was long the favourite example of what no market can provide. Then somebody"
    " looked, and found that for two centuries most of them had been built and run for profit."
)


async def main() -> None:
    """Hire a summariser once."""
    buyer = Agent("reader")
    async with joined(buyer):
        try:
            bought = await buyer.purchase(
                "summarise", Summarise(text=TEXT), returns=Summary, max_price="0.05", tries=2
            )
        except DealFailed as error:  # Nobody offered, or it went wrong: the money came back.
            print(error)
            return
        print(bought.result.summary)
        print(f"paid {bought.paid} to {bought.seller}")


if __name__ == "__main__":
    anyio.run(main)
