"""The public face: agents that sell and buy.

``from coase.agents import Agent, Job, Price`` is all that a seller needs; ``joined`` runs agents
for the length of a block, ``Node`` and ``open_node`` give the machinery underneath.
"""

from coase.negotiation.pricing import Price
from coase.protocol.errors import BudgetExhausted, DealFailed

from .agent import Agent, Purchase
from .job import Job
from .node import Node, joined, open_node
from .purse import Budget
from .seller import Windows

__all__ = [
    "Agent",
    "Budget",
    "BudgetExhausted",
    "DealFailed",
    "Job",
    "Node",
    "Price",
    "Purchase",
    "Windows",
    "joined",
    "open_node",
]
