"""The public face: agents that sell and buy.

``from coase.agents import Agent, Job, Price`` is all that a seller needs, and ``Buyer`` all that
whoever wants answers does; ``joined`` runs agents for the length of a block, ``Node`` and
``open_node`` give the machinery underneath.
"""

from coase.negotiation.pricing import Price
from coase.protocol.errors import BudgetExhausted, DealFailed

from .agent import Agent, Purchase
from .answers import Buyer
from .job import Job
from .node import Node, joined, open_node
from .plans import Plan
from .profile import Profile
from .purse import Budget
from .seller import Windows

__all__ = [
    "Agent",
    "Budget",
    "BudgetExhausted",
    "Buyer",
    "DealFailed",
    "Job",
    "Node",
    "Plan",
    "Price",
    "Profile",
    "Purchase",
    "Windows",
    "joined",
    "open_node",
]
