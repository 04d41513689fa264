"""Tools with which a LangChain agent spends a budget: see what is on sale, hire, look at the money.

::

    async with Buyer(budget="0.50", max_price="0.05") as buyer:
        agent = create_agent(model, market_tools(buyer))

What the agent is told to spend, or talked into spending, is limited by the buyer's budget where
its key signs, not by the prompt.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, Final

from langchain_core.tools import BaseTool, ToolException
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from coase.agents.answers import Buyer
from coase.agents.compute.ports import read_json
from coase.agents.forms import form_of
from coase.protocol.errors import CoaseError, ConfigurationError

SHOWN_MAX: Final = 50  # Wares, of what may be thousands; a model reads no more anyway.
TEXT_MAX_CHARS: Final = 20_000  # Of a result: what fits beside a conversation.


class _MarketTool(BaseTool):
    """A tool that works within the event loop of its buyer."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    buyer: Buyer = Field(exclude=True)
    handle_tool_error: Any = True
    _loop: asyncio.AbstractEventLoop = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Remember in which event loop the buyer lives.

        :raises ConfigurationError: if there is none: make the tools within the buyer's block
        """
        super().model_post_init(context)
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            raise ConfigurationError(
                "tools of a buyer are made in its event loop: within async with Buyer(...)"
            ) from None

    def _run(self, *args: Any, **kwargs: Any) -> str:
        """Work for a caller in another thread.

        :raises ConfigurationError: in the buyer's own event loop, which must not wait for itself
        """
        try:
            inside = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            inside = False
        if inside:
            raise ConfigurationError("in the buyer's own event loop, use ainvoke")
        return asyncio.run_coroutine_threadsafe(self._told(*args, **kwargs), self._loop).result()

    async def _arun(self, *args: Any, **kwargs: Any) -> str:
        """Work, also for a caller in another event loop."""
        if asyncio.get_running_loop() is self._loop:
            return await self._told(*args, **kwargs)
        work = asyncio.run_coroutine_threadsafe(self._told(*args, **kwargs), self._loop)
        return await asyncio.wrap_future(work)

    async def _told(self, *args: Any, **kwargs: Any) -> str:
        """Return what the model reads: what was done, or what went wrong and what is left."""
        try:
            return json.dumps(await self._work(*args, **kwargs), ensure_ascii=False)
        except CoaseError as error:
            raise ToolException(f"{error}. Left to spend: {self.buyer.left}") from error

    async def _work(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class _Which(BaseModel):
    capability: str = Field(
        default="", description="A name such as 'summarise'; empty for everything on sale."
    )


class OffersTool(_MarketTool):
    """Who sells what, at which list price, and what a task must look like. Costs nothing."""

    name: str = "coase_offers"
    description: str = (
        "See who sells a capability on the market, at which list price, and the JSON schema of its"
        " task. Costs nothing. Use it before coase_hire."
    )
    args_schema: Any = _Which

    async def _work(self, capability: str = "") -> Any:
        found = await self.buyer.sellers(capability)
        if not found:
            everything = await self.buyer.sellers() if capability else []
            names = sorted({ware.capability for _, ware in everything})[:SHOWN_MAX]
            return {"offers": [], "on_sale": names}
        offers = [
            {
                "capability": ware.capability,
                "seller": seller,
                "price": ware.price,
                "about": ware.about,
                "models": list(ware.models),
                **({"task_schema": form.schemas[0]} if capability else {}),
            }
            for seller, ware in found
            # What claims to be one thing and describes another is not shown.
            if (form := form_of(ware)) is not None
        ]
        return {"offers": offers[:SHOWN_MAX], "more": max(len(offers) - SHOWN_MAX, 0)}


class _Hire(BaseModel):
    capability: str = Field(description="A name or id from coase_offers, such as 'summarise'.")
    task: dict[str, Any] = Field(description="The task, as its schema wants it.")
    max_price: str = Field(
        default="", description="The most to pay, such as '0.01'; empty for the owner's limit."
    )


class HireTool(_MarketTool):
    """Buy a piece of work, for no more than the buyer's own limits allow."""

    name: str = "coase_hire"
    description: str = (
        "Buy a piece of work from whoever sells it for the best price. The price is locked until"
        " the result was checked, and comes back if there is none. The budget cannot be exceeded."
    )
    args_schema: Any = _Hire

    async def _work(self, capability: str, task: dict[str, Any], max_price: str = "") -> Any:
        bought = await self.buyer.order(capability, task, max_price=max_price)
        result = read_json(bought.result)
        text = bought.result
        return {
            "result": result if len(text) <= TEXT_MAX_CHARS else f"{text[:TEXT_MAX_CHARS]} (cut)",
            "seller": bought.seller,
            "paid": bought.paid,
            "deal": bought.deal,
            "left": self.buyer.left,
        }


class _Nothing(BaseModel):
    pass


class WalletTool(_MarketTool):
    """What was spent, what may still be spent, and for how much one purchase may be."""

    name: str = "coase_wallet"
    description: str = "See how much of the budget is spent and how much is left."
    args_schema: Any = _Nothing

    async def _work(self) -> Any:
        buyer = self.buyer
        return {
            "address": buyer.agent.address,
            "spent": buyer.spent,
            "left": buyer.left or "no limit",
            "max_price": buyer.max_price,
        }


def market_tools(buyer: Buyer) -> list[BaseTool]:
    """Return the tools that spend the budget of ``buyer``, for as long as its block lasts.

    :raises ConfigurationError: if they are made outside of the buyer's event loop
    """
    return [OffersTool(buyer=buyer), HireTool(buyer=buyer), WalletTool(buyer=buyer)]
