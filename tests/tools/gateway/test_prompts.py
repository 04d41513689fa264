"""All that a prompt can carry, through the clients that people have, to an engine and back.

The echo can do all of it, each in a way that shows what arrived; the real engine does what it can.
"""

from __future__ import annotations

import base64
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import ollama
import pytest

from coase.agents import Agent, Price
from coase.agents.compute.calllog import CallLog
from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.llamacpp import LlamaCppCompute
from coase.agents.compute.market import MarketCompute
from coase.agents.compute.ports import IMAGE_SIZE_MAX_BYTES, Chunk, ModelInfo, Prompt
from coase.agents.compute.router import RouterCompute
from coase.agents.inference import Stock, inference_agent
from coase.agents.seller import Windows
from coase.tools.gateway import common
from coase.tools.gateway.server import application, serving
from tests.agents.market import market
from tests.conformance.compute_servers import small_model
from tests.late import Late

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path

    import anthropic
    import openai

    from coase.agents.compute.ports import Compute
else:
    anthropic, openai = Late("anthropic"), Late("openai")

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(120),
    pytest.mark.xdist_group("clients"),  # One worker loads them.
]

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(100)).decode()
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
}
FUNCTION = {"name": "add", "description": "The sum of two numbers", "parameters": SCHEMA}
TOOLS: Any = [{"type": "function", "function": FUNCTION}]
ASKED: Any = [{"role": "user", "content": "please add 3 and 4"}]
SUM = {"a": 3, "b": 4}
THOUGHT = "I repeat 5 words. "


class Listening(EchoCompute):
    """An echo that keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Prompt] = []

    def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk, None]:
        self.asked.append(prompt)
        return super().stream(prompt)


@asynccontextmanager
async def gateway(compute: Compute) -> AsyncIterator[str]:
    app = application(RouterCompute(local=compute))
    async with serving(app, host="127.0.0.1", port=0) as url:
        yield url


@pytest.fixture
def engine() -> Listening:
    return Listening()


@pytest.fixture
async def url(engine: Listening) -> AsyncIterator[str]:
    async with gateway(engine) as address:
        yield address


@pytest.fixture
async def open_ai(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def claude(url: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def own(url: str) -> AsyncIterator[ollama.AsyncClient]:
    client = ollama.AsyncClient(host=url)
    yield client
    await client.close()  # type: ignore[no-untyped-call]


@pytest.fixture
async def web(engine: Listening) -> AsyncIterator[httpx.AsyncClient]:
    app: Any = application(RouterCompute(local=engine))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


def called(choice: Any) -> list[Any]:
    """Return the functions that an answer calls."""
    calls = choice.message.tool_calls or []
    assert all(call.type == "function" for call in calls)
    return list(calls)


# ---- OpenAI -----------------------------------------------------------------------------------


async def test_openai_calls_tools_and_reads_their_results(
    open_ai: openai.AsyncOpenAI, engine: Listening
) -> None:
    answer = await open_ai.chat.completions.create(model="echo", messages=ASKED, tools=TOOLS)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = called(choice)
    assert call.function.name == "add"
    assert json.loads(call.function.arguments) == SUM
    assert engine.asked[-1].tools[0].parameters == SCHEMA
    messages: Any = [
        *ASKED,
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "7"},
    ]
    after = await open_ai.chat.completions.create(model="echo", messages=messages, tools=TOOLS)
    assert after.choices[0].message.content == "7"
    result = engine.asked[-1].messages[-1]
    assert (result.role, result.tool_call_id) == ("tool", call.id)
    assert engine.asked[-1].messages[-2].tool_calls[0].id == call.id


async def test_openai_streams_tool_calls_and_thinking(open_ai: openai.AsyncOpenAI) -> None:
    stream = await open_ai.chat.completions.create(
        model="echo", messages=ASKED, tools=TOOLS, stream=True, reasoning_effort="high"
    )
    thinking, calls, reasons = "", [], []
    async for event in stream:
        delta = event.choices[0].delta
        thinking += getattr(delta, "reasoning_content", None) or ""
        calls += delta.tool_calls or []
        reasons.append(event.choices[0].finish_reason)
    assert thinking == THOUGHT
    assert reasons[-1] == "tool_calls"
    (call,) = calls
    assert (call.index, call.type) == (0, "function")
    assert call.id
    assert call.function is not None
    assert json.loads(call.function.arguments or "") == SUM


async def test_openai_tool_choice(open_ai: openai.AsyncOpenAI, engine: Listening) -> None:
    plain: Any = [{"role": "user", "content": "1 and 2"}]
    other: Any = {"type": "function", "function": {"name": "sub", "parameters": SCHEMA}}
    choices: Any = (
        ("auto", None),
        ("none", None),
        ("required", "add"),
        ({"type": "function", "function": {"name": "sub"}}, "sub"),
    )
    for choice, name in choices:
        answer = await open_ai.chat.completions.create(
            model="echo", messages=plain, tools=[*TOOLS, other], tool_choice=choice
        )
        calls = called(answer.choices[0])
        assert (calls[0].function.name if calls else None) == name
    with pytest.raises(openai.BadRequestError, match="none of the tools"):
        await open_ai.chat.completions.create(
            model="echo",
            messages=plain,
            tools=TOOLS,
            tool_choice={"type": "function", "function": {"name": "nope"}},
        )
    assert engine.asked[-1].tool_choice == "required"


async def test_openai_pictures_schemas_and_sampling_arrive(
    open_ai: openai.AsyncOpenAI, engine: Listening
) -> None:
    answer = await open_ai.chat.completions.create(
        model="echo",
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "5 and 6"},
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
                ],
            }
        ],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "sum", "schema": SCHEMA, "strict": True},
        },
        top_p=0.25,
        frequency_penalty=-0.5,
        presence_penalty=1,
        logprobs=True,
        top_logprobs=2,
        extra_body={"top_k": 7},
    )
    assert json.loads(answer.choices[0].message.content or "") == {"a": 5, "b": 6}
    assert answer.choices[0].logprobs is not None
    assert all(entry.top_logprobs for entry in answer.choices[0].logprobs.content or ())
    asked = engine.asked[-1]
    assert [image.data for image in asked.images] == [base64.b64decode(PNG)]
    assert asked.response_schema == SCHEMA
    assert asked.sampling() == {
        "top_k": 7,
        "top_p": 0.25,
        "frequency_penalty": -0.5,
        "presence_penalty": 1.0,
    }


async def test_openai_embeddings(open_ai: openai.AsyncOpenAI) -> None:
    texts = ["the sky is blue", "blue is the sky", "you owe me five pounds"]
    made = await open_ai.embeddings.create(model="echo", input=texts)
    as_text = await open_ai.embeddings.create(model="echo", input=texts, encoding_format="float")
    assert [entry.index for entry in made.data] == [0, 1, 2]
    assert made.usage.prompt_tokens == 13
    # Without a format the client asks for base64 and unpacks it.
    assert made.data[0].embedding == pytest.approx(as_text.data[0].embedding, abs=1e-6)
    assert made.data[0].embedding == pytest.approx(made.data[1].embedding)
    assert made.data[0].embedding != pytest.approx(made.data[2].embedding)
    short = await open_ai.embeddings.create(model="echo", input="the sky", dimensions=4)
    assert len(short.data[0].embedding) == 4
    assert sum(part * part for part in short.data[0].embedding) == pytest.approx(1)
    with pytest.raises(openai.NotFoundError):
        await open_ai.embeddings.create(model="nope", input="x")
    unfit: Any = (["x", ""], [], [1, 2])
    for bad in unfit:
        with pytest.raises(openai.BadRequestError):
            await open_ai.embeddings.create(model="echo", input=bad)
    with pytest.raises(openai.BadRequestError, match="at most"):
        await open_ai.embeddings.create(model="echo", input="x", dimensions=4_000)


# ---- Anthropic --------------------------------------------------------------------------------


async def test_anthropic_calls_tools_and_reads_their_results(
    claude: anthropic.AsyncAnthropic, engine: Listening
) -> None:
    tools: Any = [{"name": "add", "description": "Sum", "input_schema": SCHEMA}]
    answer = await claude.messages.create(
        model="echo",
        max_tokens=99,
        messages=ASKED,
        tools=tools,
        thinking={"type": "enabled", "budget_tokens": 1024},
    )
    assert answer.stop_reason == "tool_use"
    thought, call = answer.content
    assert thought.type == "thinking"
    assert thought.thinking == THOUGHT
    assert call.type == "tool_use"
    assert (call.name, call.input) == ("add", SUM)
    messages: Any = [
        *ASKED,
        {"role": "assistant", "content": [block.model_dump() for block in answer.content]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": call.id, "content": "7"},
                {"type": "text", "text": "thanks"},
            ],
        },
    ]
    after = await claude.messages.create(
        model="echo", max_tokens=99, messages=messages, tools=tools
    )
    assert [block.text for block in after.content if block.type == "text"] == ["thanks"]
    *_, called, result, said = engine.asked[-1].messages
    assert (called.thinking, called.tool_calls[0].id) == (THOUGHT, call.id)
    assert (result.role, result.content, result.tool_call_id) == ("tool", "7", call.id)
    assert (said.role, said.content) == ("user", "thanks")


async def test_anthropic_streams_blocks_one_after_the_other(
    claude: anthropic.AsyncAnthropic,
) -> None:
    async with claude.messages.stream(
        model="echo",
        max_tokens=99,
        messages=ASKED,
        tools=[{"name": "add", "input_schema": SCHEMA}],
        tool_choice={"type": "tool", "name": "add"},
        thinking={"type": "enabled", "budget_tokens": 1024},
    ) as stream:
        kinds = [event.type async for event in stream if event.type.startswith("content_block_st")]
        final = await stream.get_final_message()
    assert kinds == ["content_block_start", "content_block_stop"] * 2
    assert [block.type for block in final.content] == ["thinking", "tool_use"]
    call = final.content[1]
    assert call.type == "tool_use"
    assert call.input == SUM
    assert final.stop_reason == "tool_use"


async def test_anthropic_pictures_and_schemas_arrive(
    claude: anthropic.AsyncAnthropic, engine: Listening
) -> None:
    answer = await claude.messages.create(
        model="echo",
        max_tokens=99,
        extra_body={"top_k": 3},
        messages=[
            {
                "role": "user",
                "content": [
                    {
                        "type": "image",
                        "source": {"type": "base64", "media_type": "image/png", "data": PNG},
                    },
                    {"type": "text", "text": "5 and 6"},
                ],
            }
        ],
        output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
    )
    (block,) = answer.content
    assert block.type == "text"
    assert json.loads(block.text) == {"a": 5, "b": 6}
    assert len(engine.asked[-1].images) == 1
    assert engine.asked[-1].sampling() == {"top_k": 3}


# ---- Ollama -----------------------------------------------------------------------------------


async def test_ollama_calls_tools_and_reads_their_results(
    own: ollama.AsyncClient, engine: Listening
) -> None:
    answer = await own.chat("echo", ASKED, tools=TOOLS, think="low")
    assert answer.message.thinking == THOUGHT
    assert answer.done_reason == "stop"
    (call,) = answer.message.tool_calls or ()
    assert (call.function.name, call.function.arguments) == ("add", SUM)
    result = {"role": "tool", "content": "7", "tool_name": "add"}
    parts = [
        part
        async for part in await own.chat(
            "echo", [*ASKED, answer.message, result], tools=TOOLS, stream=True
        )
    ]
    assert "".join(part.message.content or "" for part in parts) == "7"
    *_, called, given = engine.asked[-1].messages
    assert called.tool_calls[0].read() == SUM
    assert (given.role, given.tool_name) == ("tool", "add")
    streamed = [part async for part in await own.chat("echo", ASKED, tools=TOOLS, stream=True)]
    assert [len(part.message.tool_calls or ()) for part in streamed] == [1, 0]


async def test_ollama_pictures_schemas_and_sampling_arrive(
    own: ollama.AsyncClient, engine: Listening
) -> None:
    options = {"top_p": 0.5, "top_k": 2, "min_p": 0.125, "repeat_penalty": 1.25}
    answer = await own.chat(
        "echo",
        [{"role": "user", "content": "5 and 6", "images": [PNG]}],
        format=SCHEMA,
        options=options,
        logprobs=True,
        top_logprobs=1,
    )
    assert json.loads(answer.message.content or "") == {"a": 5, "b": 6}
    assert (answer.logprobs or ())[0].top_logprobs
    assert engine.asked[-1].sampling() == options
    assert len(engine.asked[-1].images) == 1
    made = await own.generate("echo", "look", images=[PNG], think=True)
    assert (made.response, made.thinking) == ("look (1 images)", "I repeat 1 words. ")


async def test_ollama_embeddings(own: ollama.AsyncClient, web: httpx.AsyncClient) -> None:
    made = await own.embed("echo", ["the sky is blue", "you owe me"])
    assert made.prompt_eval_count == 7
    assert len(made.embeddings) == 2
    short = await own.embed("echo", "the sky is blue", dimensions=3)
    assert len(short.embeddings[0]) == 3
    old = await own.embeddings("echo", "the sky is blue")
    assert list(old.embedding) == list(made.embeddings[0])
    for path, none in (("/api/embed", "embeddings"), ("/api/embeddings", "embedding")):
        answer = await web.post(path, json={"model": "echo"})  # By which clients load a model.
        assert answer.json()[none] == []
        assert (await web.post(path, json={"model": "nope"})).status_code == 404
    with pytest.raises(ollama.ResponseError, match="not found"):
        await own.embed("nope", "x")


class Described(EchoCompute):
    """An engine that tells all that can be told of a model."""

    async def models(self) -> list[ModelInfo]:
        return [
            ModelInfo(
                name="llama3.2:3b",
                digest="ab" * 32,
                quantisation="Q4_K_M",
                context_tokens=131_072,
                loaded=True,
                size_bytes=2_019_393_189,
                capabilities=("completion", "tools"),
                family="llama",
                parameter_count=3_212_749_888,
                embedding_length=3_072,
                modified_s=1_735_689_600,
            )
        ]


async def test_ollama_tells_of_a_model_what_ollama_tells() -> None:
    """Field for field what an Ollama answers of this model, but for what nobody here knows."""
    app: Any = application(RouterCompute(local=Described()))
    transport = httpx.ASGITransport(app)
    details = {
        "parent_model": "",
        "format": "gguf",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": "3.2B",
        "quantization_level": "Q4_K_M",
    }
    entry = {
        "name": "llama3.2:3b",
        "model": "llama3.2:3b",
        "size": 2_019_393_189,
        "digest": "ab" * 32,
        "details": details,
    }
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as web:
        for path in ("/", "/api/version", "/api/tags"):
            assert (await web.head(path)).status_code == 200
        listed = (await web.get("/api/tags")).json()
        assert listed == {"models": [{**entry, "modified_at": "2025-01-01T00:00:00Z"}]}
        (loaded,) = (await web.get("/api/ps")).json()["models"]
        assert loaded.pop("expires_at") > "2026"
        assert loaded == {**entry, "size_vram": 0, "context_length": 131_072}
        shown = (await web.post("/api/show", json={"model": "llama3.2:3b"})).json()
    assert shown == {
        "license": "",
        "modelfile": "FROM llama3.2:3b\n",
        "parameters": "",
        "template": "{{ .Prompt }}",
        "details": details,
        "model_info": {
            "general.architecture": "llama",
            "general.basename": "llama3.2:3b",
            "general.parameter_count": 3_212_749_888,
            "llama.context_length": 131_072,
            "llama.embedding_length": 3_072,
        },
        "tensors": [],
        "capabilities": ["completion", "tools"],
        "modified_at": "2025-01-01T00:00:00Z",
    }


async def test_a_model_of_which_nothing_is_known_has_what_clients_cut_to_length() -> None:
    class Bare(EchoCompute):
        async def models(self) -> list[ModelInfo]:
            return [ModelInfo(name="far")]

    app: Any = application(RouterCompute(local=Bare()))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as web:
        (entry,) = (await web.get("/api/tags")).json()["models"]
    assert len(entry["digest"]) == 64
    assert entry["details"]["families"] is None
    assert entry["modified_at"]


# ---- What cannot be --------------------------------------------------------------------------

CHAT: dict[str, Any] = {"model": "echo", "messages": ASKED, "max_tokens": 9}
URL = "data:image/png;base64,"
BIG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(IMAGE_SIZE_MAX_BYTES)).decode()


def pictured(url: str) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"messages": [{"role": "user", "content": [part]}]}


def sourced(**source: Any) -> dict[str, Any]:
    part = {"type": "image", "source": source}
    return {"messages": [{"role": "user", "content": [part]}]}


def shown(image: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x", "images": [image]}]}


def formatted(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


OPENAI, ANTHROPIC, OLLAMA = "/v1/chat/completions", "/v1/messages", "/api/chat"


@pytest.mark.parametrize(
    ("path", "change", "says"),
    [
        (OPENAI, pictured("https://example.com/a.png"), "not fetched"),
        (OPENAI, pictured(URL + "####"), "base64"),
        (OPENAI, pictured(URL + "aGVsbG8="), "no PNG"),
        (OPENAI, pictured(URL + BIG), "over 8 MiB"),
        (OPENAI, formatted({"type": "nothing"}), "schema of the answer is none"),
        (OPENAI, formatted([]), "must be a JSON Schema"),
        (OPENAI, {"response_format": {"type": "json_schema", "json_schema": 3}}, "JSON Schema"),
        (OPENAI, {"tools": [{"type": "web_search"}]}, "of the type function"),
        (OPENAI, {"tools": [{"function": {"name": ""}}]}, "no name"),
        (OPENAI, {"tools": [{"function": {"name": "a b"}}]}, "the tool's name"),
        (OPENAI, {"tools": [{"function": {"name": "a", "parameters": 3}}]}, "JSON Schema"),
        (OPENAI, {"tools": 3}, "list of objects"),
        (OPENAI, {"tool_choice": "required"}, "has none"),
        (OPENAI, {"tool_choice": ["x"]}, "cannot be read"),
        (OPENAI, {"functions": [{"name": "x"}]}, "replaced by tools"),
        (OPENAI, {"reasoning_effort": "huge"}, "reasoning_effort"),
        (OPENAI, {"top_p": 2}, "top_p"),
        (OPENAI, {"top_p": "much"}, "top_p"),
        (OPENAI, {"top_k": 1.5}, "top_k"),
        (
            OPENAI,
            {"messages": [{"role": "assistant", "tool_calls": [{"function": 3}]}]},
            "no name",
        ),
        (ANTHROPIC, sourced(type="file", file_id="1"), "base64"),
        (ANTHROPIC, sourced(type="url", url="https://example.com/a.png"), "not fetched"),
        (ANTHROPIC, sourced(type="base64", data=BIG), "over 8 MiB"),
        (ANTHROPIC, {"tools": [{"type": "web_search_20250305", "name": "x"}]}, "server runs"),
        (ANTHROPIC, {"tool_choice": {"type": "some"}}, "tool_choice"),
        (ANTHROPIC, {"output_config": {"format": {"type": "xml"}}}, "cannot be read"),
        (
            ANTHROPIC,
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "tool_use_id",
        ),
        (
            ANTHROPIC,
            {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
            "'document' parts",
        ),
        (OLLAMA, shown("####"), "base64"),
        (OLLAMA, shown(3), "base64"),
        (OLLAMA, shown(BIG), "over 8 MiB"),
        (OLLAMA, {"messages": [{"role": "user", "content": "x", "images": "x"}]}, "a list"),
        (OLLAMA, {"format": {"type": "nothing"}}, "schema of the answer is none"),
        (OLLAMA, {"format": "yaml"}, "format must be"),
        (OLLAMA, {"options": {"top_k": -1}}, "top_k"),
    ],
)
async def test_what_cannot_be_read_is_refused_with_its_cause(
    web: httpx.AsyncClient, path: str, change: dict[str, Any], says: str
) -> None:
    answer = await web.post(path, json={**CHAT, **change})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert says in (error if path == OLLAMA else error["message"])


@pytest.mark.parametrize(("path", "word"), [(OPENAI, "code"), (ANTHROPIC, "message")])
async def test_a_prompt_that_is_too_long_is_told_in_the_apis_own_word(
    web: httpx.AsyncClient, path: str, word: str
) -> None:
    long = {"messages": [{"role": "user", "content": "x" * (2**20 + 1)}]}
    answer = await web.post(path, json={**CHAT, **long})
    assert answer.status_code == 400
    own = {"code": "context_length_exceeded", "message": "prompt is too long"}
    assert own[word] in answer.json()["error"][word]


async def test_bodies_fill_no_memory_however_many_come(
    web: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps(CHAT).encode()
    monkeypatch.setattr(common, "BODIES_SIZE_MAX_BYTES", 2 * len(body) - 2)
    begun, go_on = anyio.Event(), anyio.Event()
    answers: list[httpx.Response] = []

    async def slow() -> AsyncIterator[bytes]:
        yield body[:-1]
        begun.set()
        await go_on.wait()
        yield body[-1:]

    async def ask() -> None:
        answers.append(await web.post(OPENAI, content=slow()))

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        await begun.wait()
        other = await web.post(OPENAI, content=body)
        assert other.status_code == 429
        assert "large bodies" in other.json()["error"]["message"]
        go_on.set()
    assert answers[0].status_code == 200
    assert (await web.post(OPENAI, content=body)).status_code == 200


class Plain(EchoCompute):
    """An engine whose model does not think."""

    async def models(self) -> list[ModelInfo]:
        return [ModelInfo(name="echo")]


async def test_how_hard_to_think_is_a_hint_where_nobody_thinks() -> None:
    app: Any = application(RouterCompute(local=Plain()))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as web:
        answer = await web.post(OPENAI, json={**CHAT, "reasoning_effort": "low"})
        assert answer.headers["x-coase-ignored"] == "reasoning_effort"
        assert "reasoning_content" not in answer.json()["choices"][0]["message"]


# ---- The market --------------------------------------------------------------------------------


async def test_tools_pictures_and_vectors_are_bought_where_nothing_is_here(tmp_path: Path) -> None:
    engine = Listening()
    seller = inference_agent(
        "seller",
        price=Price.per_million(input="2", output="8"),
        compute=engine,
        stock=Stock(await engine.models()),
        strategy="fixed",
        windows=Windows(lock_s=100, dispute_s=100, answer_s=100, rule_s=100),
    )
    buyer = Agent("buyer", budget="1")
    async with market(tmp_path) as place:
        await place.join(seller, buyer)
        bought = MarketCompute(buyer, max_price="0.1", decide_after_ms=50)
        calls = CallLog(tmp_path / "gateway")
        app: Any = application(RouterCompute(market=bought, calls=calls))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as web:
            part = {"type": "image_url", "image_url": {"url": URL + PNG}}
            seen = [{"role": "user", "content": [{"type": "text", "text": "add 3 and 4"}, part]}]
            body = {**CHAT, "messages": seen, "tools": TOOLS, "reasoning_effort": "low"}
            answer = await web.post(OPENAI, json=body, timeout=60)
            assert answer.headers["x-coase-made"] == "bought"
            (choice,) = answer.json()["choices"]
            assert choice["finish_reason"] == "tool_calls"
            (call,) = choice["message"]["tool_calls"]
            assert json.loads(call["function"]["arguments"]) == SUM
            assert choice["message"]["reasoning_content"].startswith("I repeat")
            made = await web.post(
                "/api/embed", json={"model": "echo", "input": ["a b", "c"]}, timeout=60
            )
            assert made.json()["prompt_eval_count"] == 3
            assert len(made.json()["embeddings"]) == 2
            assert (
                made.headers["x-coase-seller"] == seller.address == made.json()["coase"]["seller"]
            )
            kept = calls.find(made.headers["x-coase-call"])
            assert kept is not None
            (attempt,) = kept["attempts"]
            assert (attempt["seller"], attempt["outcome"]) == (seller.address, "answered")
            assert (attempt["deal"], kept["paid"]) == (
                made.headers["x-coase-deal"],
                made.headers["x-coase-paid"],
            )
            older = await web.post("/api/embeddings", json={"model": "echo", "prompt": "a"})
            assert older.headers["x-coase-seller"] == seller.address
            missing = await web.post("/v1/embeddings", json={"model": "none", "input": "a"})
            assert missing.status_code == 503
            assert calls.latest(1)[0]["outcome"].startswith("failed: embeddings could not be")
        calls.close()
        assert [image.data for image in engine.asked[-1].images] == [base64.b64decode(PNG)]
        await place.rest()


# ---- The real engine --------------------------------------------------------------------------


@pytest.mark.xdist_group("compute")
async def test_the_real_engine_keeps_to_schemas_and_makes_vectors() -> None:
    engine = LlamaCppCompute(small_model())
    name = (await engine.models())[0].name
    try:
        async with (
            gateway(engine) as url,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        ):
            bound = await client.chat.completions.create(
                model=name,
                messages=ASKED,
                max_tokens=60,
                temperature=0,
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "sum", "schema": SCHEMA},
                },
            )
            found = json.loads(bound.choices[0].message.content or "")
            assert set(found) == {"a", "b"}
            assert all(isinstance(number, int) for number in found.values())
            made = await client.embeddings.create(model=name, input=["hello", "good day"])
            assert {len(entry.embedding) for entry in made.data} == {576}
            with pytest.raises(openai.BadRequestError, match="takes no images"):
                await client.chat.completions.create(
                    model=name, max_tokens=1, messages=pictured(URL + PNG)["messages"]
                )
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(
                    model=name, messages=[{"role": "user", "content": "word " * 4_000}]
                )
            assert caught.value.code == "context_length_exceeded"
    finally:
        await engine.close()
