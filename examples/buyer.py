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
    buyer, task = Agent("reader"), Summarise(text=TEXT)
    async with joined(buyer):
        try:
            bought = await buyer.purchase("summarise", task, returns=Summary, max_price="0.05")
        except DealFailed as error:  # What was locked has come back, or will by its deadline.
            print(error)
        else:
            print(f"{bought.result.summary}\npaid {bought.paid} to {bought.seller}")


if __name__ == "__main__":
    anyio.run(main)
