"""A seller in about twenty lines: it summarises texts with whatever engine is here.

Run it beside ``coase up``::

    coase agent run examples/seller.py
"""

from __future__ import annotations

from coase.agents import Agent, Job, Price
from coase.agents.compute.ports import Prompt
from coase.agents.wares import Summarise, Summary

seller = Agent("summariser")


@seller.offers("summarise", price=Price.per_task("0.02", floor_permille=700), strategy="boulware")
async def summarise(task: Summarise, job: Job) -> Summary:
    """Write one sentence about a text."""
    question = f"Summarise this text in one short sentence:\n\n{task.text}"
    written = await job.complete(Prompt.ask(question, max_tokens=60))
    return Summary(summary=written.text.strip() or "(nothing)")


if __name__ == "__main__":
    seller.run()
