"""Tools that an agent is handed with a budget: on a market that runs beside the tests."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from langchain_core.messages import ToolMessage
from langchain_tests.integration_tests import ToolsIntegrationTests
from langchain_tests.unit_tests import ToolsUnitTests

from coase.agents import Buyer
from coase.protocol.errors import ConfigurationError
from coase.tools.langchain import OffersTool, market_tools
from tests.agents.market import market
from tests.agents.test_workers import scribe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from langchain_core.tools import BaseTool

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(120),
    pytest.mark.xdist_group("langchain"),
]

HIRE = {"capability": "summarise", "task": {"text": "some words"}, "max_price": "0.02"}


@asynccontextmanager
async def shop(folder: Path) -> AsyncIterator[list[BaseTool]]:
    """The tools of a buyer with a budget for few purchases, on a market with one seller."""
    async with market(folder) as place:
        buyer = Buyer(budget="0.6", max_price="0.05", engine=None, node=place.node)
        await place.join(scribe("anna"), buyer.agent)
        async with buyer:
            yield market_tools(buyer)


@pytest.fixture(scope="module")
def portal() -> Iterator[BlockingPortal]:
    with start_blocking_portal("asyncio") as running:
        yield running


@pytest.fixture(scope="module")
def tools(
    portal: BlockingPortal, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, BaseTool]]:
    with portal.wrap_async_context_manager(shop(tmp_path_factory.mktemp("shop"))) as made:
        yield {tool.name: tool for tool in made}


class _Suite:
    called = ""
    example: dict[str, Any] = {}  # noqa: RUF012 - not changed

    @pytest.fixture(autouse=True)
    def hand(self, tools: dict[str, BaseTool]) -> None:
        self.made = tools[self.called]

    @property
    def tool_constructor(self) -> BaseTool:
        return self.made

    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        return self.example


class _Offers(_Suite):
    called, example = "coase_offers", {"capability": "summarise"}


class _Hire(_Suite):
    called, example = "coase_hire", HIRE


class _Wallet(_Suite):
    called = "coase_wallet"


class TestOffersUnit(_Offers, ToolsUnitTests): ...


class TestOffersIntegration(_Offers, ToolsIntegrationTests): ...


class TestHireUnit(_Hire, ToolsUnitTests): ...


@pytest.mark.slow  # Four purchases, which are made below as well.
class TestHireIntegration(_Hire, ToolsIntegrationTests): ...


class TestWalletUnit(_Wallet, ToolsUnitTests): ...


class TestWalletIntegration(_Wallet, ToolsIntegrationTests): ...


def told(tool: BaseTool, **arguments: Any) -> Any:
    """Return what a model is told when it calls a tool."""
    message = tool.invoke({"name": tool.name, "args": arguments, "id": "1", "type": "tool_call"})
    assert isinstance(message, ToolMessage)
    return json.loads(str(message.content)) if message.status == "success" else message.content


def test_an_agent_sees_what_is_on_sale_hires_it_and_sees_what_is_left(
    tools: dict[str, BaseTool],
) -> None:
    offers = told(tools["coase_offers"], capability="summarise")["offers"]
    assert [offer["price"] for offer in offers] == ["0.01 a task"]
    assert "text" in offers[0]["task_schema"]["properties"]
    before = told(tools["coase_wallet"])
    assert before["max_price"] == "0.05"
    hired = told(tools["coase_hire"], **HIRE)
    assert hired["result"] == {"summary": "some by anna"}
    assert hired["paid"] == "0.01 COASE"
    after = told(tools["coase_wallet"])
    assert after["spent"] != before["spent"]
    assert after["left"] != before["left"]


def test_what_cannot_be_had_is_told_to_the_model_and_not_raised(
    tools: dict[str, BaseTool],
) -> None:
    hire, offers = tools["coase_hire"], tools["coase_offers"]
    assert "nobody sells 'painting'" in told(hire, capability="painting", task={})
    assert told(offers, capability="painting")["offers"] == []
    assert any("summarise" in name for name in told(offers, capability="painting")["on_sale"])
    assert "its fields: text" in told(hire, capability="summarise", task={"txt": "x"})
    cheap = told(hire, **HIRE | {"max_price": "0.001"})
    assert "Left to spend: 0." in cheap


def test_no_word_of_a_model_buys_above_the_owners_limit(tools: dict[str, BaseTool]) -> None:
    hire = tools["coase_hire"]
    dear = told(hire, **HIRE | {"max_price": "1000000"})
    assert dear["paid"] == "0.01 COASE"
    assert "everything" in told(hire, **HIRE | {"max_price": "everything"})


async def test_the_tools_belong_to_the_event_loop_of_their_buyer(
    tmp_path: Path, tools: dict[str, BaseTool]
) -> None:
    async with shop(tmp_path) as own:
        wallet = own[-1]
        assert "0.6 COASE" in await wallet.ainvoke({})
        with pytest.raises(ConfigurationError, match="ainvoke"):
            wallet.invoke({})
    assert "COASE" in await tools["coase_wallet"].ainvoke({})  # Of another loop's buyer.


def test_without_an_event_loop_there_are_no_tools() -> None:
    with pytest.raises(ConfigurationError, match="within async with"):
        OffersTool(buyer=Buyer(budget="1"))
