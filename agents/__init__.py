"""The public face: agents that sell and buy.

``from coase.agents import Agent, Job, Price`` is all that a seller needs, and ``Buyer`` all that
whoever wants answers does; ``joined`` runs agents for the length of a block, ``Node`` and
``open_node`` give the machinery underneath.

Each name is loaded when it is asked for: a command that reads a file needs no runtime.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coase.negotiation.pricing import Price
    from coase.protocol.errors import BudgetExhausted, DealFailed

    from .agent import Agent
    from .answers import Buyer
    from .job import Job
    from .node import Node, joined, open_node
    from .plans import Plan
    from .profile import Profile
    from .purchasing import Purchase
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

_PLACES = {
    "Agent": "coase.agents.agent",
    "Budget": "coase.agents.purse",
    "BudgetExhausted": "coase.protocol.errors",
    "Buyer": "coase.agents.answers",
    "DealFailed": "coase.protocol.errors",
    "Job": "coase.agents.job",
    "Node": "coase.agents.node",
    "Plan": "coase.agents.plans",
    "Price": "coase.negotiation.pricing",
    "Profile": "coase.agents.profile",
    "Purchase": "coase.agents.purchasing",
    "Windows": "coase.agents.seller",
    "joined": "coase.agents.node",
    "open_node": "coase.agents.node",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_PLACES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
