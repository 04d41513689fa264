"""LangChain's chat model, over a gateway and over an engine."""

from __future__ import annotations

import base64
import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from langchain_core.messages import AIMessage, ChatMessage, HumanMessage, SystemMessage
from langchain_core.tools import tool
from pydantic import BaseModel

from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.llamacpp import LlamaCppCompute
from coase.agents.compute.model import find_model
from coase.agents.compute.router import RouterCompute
from coase.protocol.errors import ComputeFailed, ConfigurationError
from coase.tools.gateway.server import application, serving
from coase.tools.langchain import ChatCoase

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from coase.agents.compute.ports import Chunk, Prompt

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

WORDS = "one two three four"
PNG = b"\x89PNG\r\n\x1a\n and so on"


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


@tool
def double(number: int) -> int:
    """Return twice the number."""
    return 2 * number


@tool
def halve(number: int) -> int:
    """Return half the number."""
    return number // 2


@pytest.fixture
async def url() -> AsyncIterator[str]:
    app = application(RouterCompute(local=EchoCompute()))
    async with serving(app, host="127.0.0.1", port=0) as address:
        yield address


@pytest.fixture(params=["gateway", "engine"])
def model(request: pytest.FixtureRequest, url: str) -> ChatCoase:
    if request.param == "engine":
        return ChatCoase(compute=RouterCompute(local=EchoCompute()))
    return ChatCoase(base_url=url)


async def test_an_answer_comes_with_its_usage_and_origin(model: ChatCoase) -> None:
    answer = await model.ainvoke([SystemMessage("Be short."), HumanMessage(WORDS)])
    assert answer.text == WORDS
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 4
    assert answer.response_metadata["finish_reason"] == "stop"
    told = answer.response_metadata["coase"]
    assert (told["made"], told["explanation"]["outcome"]) == ("local", "answered")
    assert told["call"]


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
    with pytest.raises(ValueError, match="kind 'chat'"):
        await model.ainvoke([ChatMessage(content="x", role="critic")])
    for block, why in (
        ({"type": "audio", "base64": "eA=="}, "no model here reads audio"),
        ({"type": "image", "url": "https://example.org/x.png"}, "given whole"),
        ({"type": "image_url", "image_url": {"url": "data:image/png,x"}}, "must be in base64"),
        ({"type": "image", "base64": "?", "mime_type": "image/png"}, "no base64"),
    ):
        with pytest.raises(ValueError, match=why):
            await model.ainvoke([HumanMessage([block])])
    with pytest.raises(ComputeFailed, match="nope"):
        await model.ainvoke(WORDS, model="nope")


async def test_pictures_reach_the_engine_in_every_shape(model: ChatCoase) -> None:
    data = base64.b64encode(PNG).decode()
    shapes: list[dict[str, Any]] = [
        {"type": "image", "base64": data, "mime_type": "image/png"},
        {
            "type": "image",
            "source_type": "base64",
            "data": data,
            "mime_type": "image/png",
        },
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "image", "source": {"type": "base64", "data": data}},
    ]
    question = HumanMessage([{"type": "text", "text": "What?"}, *shapes])
    assert (await model.ainvoke([question])).text == "What? (4 images)"


async def test_thoughts_come_beside_the_answer(url: str) -> None:
    class Thinking(EchoCompute):
        def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk, None]:
            return super().stream(replace(prompt, thinking=True))

    app = application(RouterCompute(local=Thinking()))
    async with serving(app, host="127.0.0.1", port=0) as address:
        for model in (ChatCoase(base_url=address), ChatCoase(compute=Thinking())):
            answer = await model.ainvoke(WORDS)
            kinds = [block["type"] for block in answer.content_blocks]
            assert kinds == ["reasoning", "text"]
            assert answer.text == WORDS


async def test_tools_are_called_and_their_results_read(model: ChatCoase) -> None:
    bound = model.bind_tools([double, halve])
    asked = HumanMessage("double the 21 for me")
    called = await bound.ainvoke([asked])
    assert [(call["name"], call["args"]) for call in called.tool_calls] == [
        ("double", {"number": 21})
    ]
    assert called.response_metadata["finish_reason"] == "tool_calls"
    result = await double.ainvoke(called.tool_calls[0])
    assert (await bound.ainvoke([asked, called, result])).text == "42"
    forced = model.bind_tools([double, halve], tool_choice="halve")
    assert (await forced.ainvoke("Hello 8")).tool_calls[0]["name"] == "halve"
    none = model.bind_tools([double], tool_choice="none")
    assert (await none.ainvoke("double the 21")).tool_calls == []
    with pytest.raises(ValueError, match="there is: double, halve"):
        model.bind_tools([double, halve], tool_choice="treble")


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
async def test_an_answer_fits_its_schema_and_one_that_does_not_says_so(
    model: ChatCoase, method: Any
) -> None:
    structured = model.with_structured_output(Person, method=method, include_raw=True)
    found: Any = await structured.ainvoke("Ann is 7")
    assert found["parsed"] == Person(name="Ann is 7", age=7)
    assert found["raw"].usage_metadata["output_tokens"] > 0
    cut: Any = await structured.ainvoke("Ann is old", max_tokens=1)
    assert (cut["parsed"] is None) == (cut["parsing_error"] is not None) or cut["parsed"].age == 0
    with pytest.raises(ValueError, match="no method"):
        model.with_structured_output(Person, method="telepathy")  # type: ignore[arg-type]


async def test_it_can_be_asked_without_an_event_loop(url: str) -> None:
    model = ChatCoase(base_url=url)
    answer = await anyio.to_thread.run_sync(model.invoke, WORDS)
    assert answer.text == WORDS
    texts = await anyio.to_thread.run_sync(lambda: [part.text for part in model.stream(WORDS)])
    assert "".join(str(text) for text in texts) == WORDS


def test_an_engine_cannot() -> None:
    with pytest.raises(ConfigurationError, match="ainvoke"):
        ChatCoase(compute=EchoCompute()).invoke(WORDS)


@pytest.mark.slow
async def test_the_small_model_is_bound_to_tools_and_schemas() -> None:
    path = find_model()
    assert path is not None
    engine = LlamaCppCompute(path)
    try:
        model = ChatCoase(compute=engine, max_tokens=60, seed=7)
        structured = model.with_structured_output(Person)
        found: Any = await structured.ainvoke("Ann is seven years old.")
        assert isinstance(found, Person)
        called = await model.bind_tools([double, halve], tool_choice="halve").ainvoke("Halve 8!")
        assert [call["name"] for call in called.tool_calls] == ["halve"]
        assert isinstance(called.tool_calls[0]["args"]["number"], int)
    finally:
        await engine.close()
