"""A seller of inference by the token: what ``coase ask`` buys.

Run it beside ``coase up``::

    coase agent run examples/inference.py
"""

from __future__ import annotations

from coase.agents import Price
from coase.agents.inference import inference_agent

oracle = inference_agent(
    "oracle", price=Price.per_million(input="2", output="8", floor_permille=600)
)


if __name__ == "__main__":
    oracle.run()
