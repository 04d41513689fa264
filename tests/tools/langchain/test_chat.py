"""LangChain's chat model, over a gateway and over an engine."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage

from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.router import RouterCompute
from coase.protocol.errors import ComputeFailed, ConfigurationError
from coase.tools.gateway.server import application, serving
from coase.tools.langchain import ChatCoase

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

WORDS = "one two three four"


@pytest.fixture
async def url() -> AsyncIterator[str]:
    app = application(RouterCompute(local=EchoCompute()))
    async with serving(app, host="127.0.0.1", port=0) as address:
        yield address


@pytest.fixture(params=["gateway", "engine"])
def model(request: pytest.FixtureRequest, url: str) -> ChatCoase:
    if request.param == "engine":
        return ChatCoase(compute=EchoCompute())
    return ChatCoase(base_url=url)


async def test_an_answer_comes_with_its_usage_and_origin(model: ChatCoase) -> None:
    answer = await model.ainvoke([SystemMessage("Be short."), HumanMessage(WORDS)])
    assert answer.text == WORDS
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 4
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.response_metadata["coase"] == {"made": "local"}


async def test_it_streams_and_the_parts_add_up(model: ChatCoase) -> None:
    parts: list[Any] = [part async for part in model.astream(WORDS)]
    assert len([part for part in parts if part.text]) == 4
    whole = functools.reduce(lambda left, right: left + right, parts)
    assert whole.text == WORDS
    assert whole.usage_metadata["total_tokens"] == 8
    assert parts[-1].chunk_position == "last"


async def test_a_conversation_and_its_options_reach_the_engine(model: ChatCoase) -> None:
    begun = [HumanMessage(WORDS), AIMessage("one two")]
    assert (await model.ainvoke(begun)).text == " three four"
    assert (await model.ainvoke(WORDS, stop=["three"])).text == "one two"
    short = await model.ainvoke(WORDS, max_tokens=1)
    assert (short.text, short.response_metadata["finish_reason"]) == ("one", "length")


async def test_what_no_model_here_reads_is_refused(model: ChatCoase) -> None:
    with pytest.raises(ValueError, match="tool"):
        await model.ainvoke([HumanMessage("x"), ToolMessage("y", tool_call_id="1")])
    with pytest.raises(ValueError, match="image"):
        await model.ainvoke([HumanMessage([{"type": "image", "url": "x"}])])
    with pytest.raises(ComputeFailed, match="nope"):
        await model.ainvoke(WORDS, model="nope")


async def test_it_can_be_asked_without_an_event_loop(url: str) -> None:
    model = ChatCoase(base_url=url)
    answer = await anyio.to_thread.run_sync(model.invoke, WORDS)
    assert answer.text == WORDS
    texts = await anyio.to_thread.run_sync(lambda: [part.text for part in model.stream(WORDS)])
    assert "".join(str(text) for text in texts) == WORDS


def test_an_engine_cannot() -> None:
    with pytest.raises(ConfigurationError, match="ainvoke"):
        ChatCoase(compute=EchoCompute()).invoke(WORDS)
