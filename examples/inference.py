"""A seller of inference by the token: what ``coase ask`` buys.

Run it beside ``coase up``::

    coase agent run examples/inference.py
"""

from __future__ import annotations

from coase.agents import Agent, Job, Price
from coase.agents.compute.ports import Prompt
from coase.agents.wares import Completion, Inference

oracle = Agent("oracle")


@oracle.offers(
    "inference",
    price=Price.per_million(input="2", output="8", floor_permille=600),
    strategy="linear",
)
async def infer(task: Inference, job: Job) -> Completion:
    """Run a prompt on the engine of this machine."""
    written = await job.complete(
        Prompt.ask(task.prompt, system=task.system, max_tokens=task.max_tokens, seed=task.seed),
        show=True,
    )
    return Completion(
        text=written.text,
        model=job.agent.compute.name,
        input_tokens=written.usage.input_tokens,
        output_tokens=written.usage.output_tokens,
        finish=written.done_reason or "stop",
    )


if __name__ == "__main__":
    oracle.run()
