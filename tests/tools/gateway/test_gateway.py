"""The gateway, asked by the clients that people have, over a real socket."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import httpx
import ollama
import pytest

from coase.agents import Agent, Price
from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.gate import Limits
from coase.agents.compute.llamacpp import LlamaCppCompute
from coase.agents.compute.market import MarketCompute
from coase.agents.compute.ports import ModelInfo
from coase.agents.compute.router import RouterCompute
from coase.agents.inference import Stock, inference_agent
from coase.agents.seller import Windows
from coase.protocol.errors import ConfigurationError
from coase.tools.gateway.common import BODY_SIZE_MAX_BYTES
from coase.tools.gateway.server import Doors, application, read_keys, serving
from tests.agents.market import market
from tests.conformance.compute_servers import small_model
from tests.late import Late

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
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

WORDS = "one two three four five six"
ASKED: Any = [{"role": "user", "content": WORDS}]
PATIENT = Windows(lock_s=100, dispute_s=100, answer_s=100, rule_s=100)
PATHS = ("/v1/chat/completions", "/v1/messages", "/api/chat")


@asynccontextmanager
async def gateway(
    local: Compute | None = None, bought: Compute | None = None, doors: Doors | None = None
) -> AsyncIterator[str]:
    router = RouterCompute(local=local, market=bought)
    async with serving(application(router, doors), host="127.0.0.1", port=0) as url:
        yield url


@asynccontextmanager
async def inside(
    local: Compute | None = None, bought: Compute | None = None, doors: Doors | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """The same without a socket, for what a client library adds nothing to."""
    app: Any = application(RouterCompute(local=local, market=bought), doors)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@pytest.fixture
async def web() -> AsyncIterator[httpx.AsyncClient]:
    async with inside(EchoCompute()) as client:
        yield client


@pytest.fixture
async def echo() -> AsyncIterator[str]:
    async with gateway(EchoCompute()) as url:
        yield url


@asynccontextmanager
async def buying(folder: Path, *, budget: str | None = None) -> AsyncIterator[MarketCompute]:
    """A purchaser on a market with one seller of the model ``far``."""
    seller = inference_agent(
        "seller",
        price=Price.per_task("0.02"),
        compute=_Named("far"),
        stock=Stock([ModelInfo(name="far")]),
        strategy="fixed",
        windows=PATIENT,
    )
    buyer = Agent("buyer", budget=budget)
    async with market(folder) as place:
        await place.join(seller, buyer)
        yield MarketCompute(buyer, max_price="0.05", decide_after_ms=50)
        await place.rest()


class _Named(EchoCompute):
    """An echo that takes any name of a model for its own."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(**options)
        self._named = name

    async def models(self) -> list[ModelInfo]:
        return [ModelInfo(name=self._named)]

    def stream(self, prompt: Any) -> Any:
        from dataclasses import replace

        return super().stream(replace(prompt, model=None))


def open_ai(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def claude(url: str) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0)


async def test_the_openai_client(echo: str) -> None:
    async with open_ai(echo) as client:
        assert [entry.id async for entry in client.models.list()] == ["echo"]
        assert (await client.models.retrieve("echo")).owned_by == "local"
        raw = await client.chat.completions.with_raw_response.create(
            model="echo",
            messages=[{"role": "developer", "content": "Be short."}, ASKED[0]],
            top_p=0.5,
            verbosity="low",
        )
        assert raw.headers["x-coase-made"] == "local"
        assert raw.headers["x-coase-ignored"] == "verbosity"
        answer = raw.parse()
        assert answer.choices[0].message.content == WORDS
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 6
        stream = await client.chat.completions.create(
            model="echo",
            messages=ASKED,
            stream=True,
            max_tokens=4,
            stream_options={"include_usage": True},
        )
        events = [event async for event in stream]
        texts = [event.choices[0].delta.content or "" for event in events if event.choices]
        assert "".join(texts) == "one two three four"
        assert events[-2].choices[0].finish_reason == "length"
        assert events[-1].usage is not None
        assert events[-1].usage.completion_tokens == 4
        plain = await client.completions.create(model="echo", prompt=WORDS, stop="four")
        assert plain.choices[0].text == "one two three"
        scored = await client.chat.completions.create(
            model="echo",
            messages=ASKED,
            logprobs=True,
        )
        assert scored.choices[0].logprobs is not None
        assert len(scored.choices[0].logprobs.content or ()) == 6


async def test_the_ollama_client(echo: str) -> None:
    async with httpx.AsyncClient() as plain:
        assert (await plain.head(echo)).status_code == 200
        assert (await plain.get(f"{echo}/api/version")).json()["version"]
    client = ollama.AsyncClient(host=echo)
    assert [entry.model for entry in (await client.list()).models] == ["echo"]
    assert "completion" in ((await client.show("echo:latest")).capabilities or ())
    assert [entry.name for entry in (await client.ps()).models] == ["echo"]
    answer = await client.chat("echo", ASKED, options={"num_predict": 2, "num_ctx": 99})
    assert answer.message.content == "one two"
    assert (answer.done_reason, answer.eval_count) == ("length", 2)
    parts = [part async for part in await client.generate("echo", WORDS, stream=True)]
    assert "".join(part.response or "" for part in parts) == WORDS
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count == 6
    assert (await client.generate("echo")).done_reason == "load"
    assert (await client.generate("echo", keep_alive=0)).done_reason == "unload"
    bound = await client.generate("echo", WORDS, format="json")
    assert json.loads(bound.response or "") == {"echo": WORDS}
    await client.close()  # type: ignore[no-untyped-call]


async def test_the_anthropic_client(echo: str) -> None:
    async with claude(echo) as client:
        answer = await client.messages.create(
            model="echo",
            max_tokens=3,
            system="Be short.",
            messages=ASKED,
        )
        assert [block.text for block in answer.content if block.type == "text"] == ["one two three"]
        assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", 3)
        async with client.messages.stream(
            model="echo",
            max_tokens=50,
            messages=[{"role": "user", "content": [{"type": "text", "text": WORDS}]}],
        ) as stream:
            assert "".join([text async for text in stream.text_stream]) == WORDS
            final = await stream.get_final_message()
        assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 6)
        assert [entry.id async for entry in client.models.list()] == ["echo"]
        counted = await client.messages.count_tokens(model="echo", messages=ASKED)
        assert counted.input_tokens == 6


async def test_a_begun_answer_is_gone_on_with(echo: str) -> None:
    async with claude(echo) as client:
        answer = await client.messages.create(
            model="echo",
            max_tokens=50,
            messages=[*ASKED, {"role": "assistant", "content": "one two"}],
        )
        assert [block.text for block in answer.content if block.type == "text"] == [
            " three four five six"
        ]


CHAT: dict[str, Any] = {"model": "echo", "messages": ASKED, "max_tokens": 9}
IMAGE = [{"role": "user", "content": [{"type": "picture", "picture": {"url": "x"}}]}]


def message_of(path: str, body: Any) -> str:
    """Return what an error says, from where the API's clients look for it."""
    if path.startswith("/api/"):
        return str(body["error"])
    if path == "/v1/messages":
        assert body["type"] == "error"
        assert body["error"]["type"]
    return str(body["error"]["message"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"model": "nope"}, 404, "nope"),
        ({"model": 7}, 400, "model must be a text"),
        ({"messages": 7}, 400, "messages must be a list"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "the role must be one of"),
        ({"messages": IMAGE}, 400, "parts are not taken"),
        ({"tools": [{"type": "function"}]}, 400, "tools[0]"),
        (b"{", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        (b"[]", 400, "no JSON object"),
        (b" " * (BODY_SIZE_MAX_BYTES + 1), 413, "over 20 MiB"),
        ({"messages": [{"role": "user", "content": "x" * 2**20 + "x"}]}, 400, "over 1048576 bytes"),
    ],
    ids="model number messages role image tools half deep list large prompt".split(),
)
async def test_what_cannot_be_served_is_refused_in_the_apis_own_words(
    web: httpx.AsyncClient, path: str, change: Any, status: int, says: str
) -> None:
    content = change if isinstance(change, bytes) else json.dumps({**CHAT, **change}).encode()
    answer = await web.post(path, content=content)
    assert answer.status_code == status, answer.text
    assert says in message_of(path, answer.json())


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("/v1/chat/completions", {"n": 2}),
        ("/v1/chat/completions", {"temperature": 3}),
        ("/v1/chat/completions", {"response_format": {"type": "yaml"}}),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}),
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/messages", {"max_tokens": None}),
        ("/v1/messages", {"thinking": {"type": "loud"}}),
        ("/api/chat", {"think": "aloud"}),
        ("/api/chat", {"options": 3}),
        ("/api/generate", {"prompt": "x", "images": ["eA=="]}),
    ],
)
async def test_each_api_refuses_what_it_alone_has(
    web: httpx.AsyncClient, path: str, change: dict[str, Any]
) -> None:
    answer = await web.post(path, json={**CHAT, **change})
    assert answer.status_code == 400
    assert message_of(path, answer.json())


async def test_what_is_not_served_says_so_in_the_shape_of_its_api(web: httpx.AsyncClient) -> None:
    assert "not served" in (await web.post("/api/pull", json={})).json()["error"]
    answer = await web.post("/v1/responses", json={})
    assert answer.status_code == 404
    assert "not served" in answer.json()["error"]["message"]
    assert (await web.get("/v1/messages")).status_code == 405


async def test_what_is_not_here_is_bought_and_the_answer_says_so(tmp_path: Path) -> None:
    async with buying(tmp_path) as bought, gateway(EchoCompute(), bought) as url:
        async with open_ai(url) as client:
            assert [entry.id async for entry in client.models.list()] == ["echo", "far"]
            raw = await client.chat.completions.with_raw_response.create(
                model="far",
                messages=ASKED,
                temperature=0,
            )
        assert raw.headers["x-coase-made"] == "bought"
        assert raw.headers["x-coase-paid"] == "0.02 COASE"
        assert raw.headers["x-coase-seller"].startswith("0x")
        assert raw.parse().choices[0].message.content == WORDS
        own = ollama.AsyncClient(host=url)
        parts = [part async for part in await own.chat("far", ASKED, stream=True)]
        assert sorted("".join(p.message.content or "" for p in parts).split()) == sorted(
            WORDS.split()
        )
        assert parts[-1].eval_count == 6
        await own.close()  # type: ignore[no-untyped-call]


async def test_whoever_comes_when_the_engine_is_busy_is_bought_for(tmp_path: Path) -> None:
    slow = _Named("far", limits=Limits(concurrency=1, queue_max=0), chunk_delay_s=3600)
    async with buying(tmp_path) as bought, gateway(slow, bought) as url, httpx.AsyncClient() as web:
        body = {"model": "far", "messages": ASKED, "stream": False}
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: web.post(f"{url}/api/chat", json=body, timeout=None))
            while not slow._gate.inside:  # noqa: ASYNC110 - an engine has no event for it.
                await anyio.sleep(0.01)
            answer = await web.post(f"{url}/api/chat", json=body, timeout=60)
            group.cancel_scope.cancel()
        assert answer.headers["x-coase-made"] == "bought"
        assert answer.json()["coase"]["paid"] == "0.02 COASE"
        while slow._gate.inside:  # noqa: ASYNC110 - its client has gone, and so it stops.
            await anyio.sleep(0.01)


async def test_a_budget_that_is_used_up_is_a_402_in_each_api(tmp_path: Path) -> None:
    async with buying(tmp_path, budget="0.01") as bought, inside(None, bought) as client:
        for path in PATHS:
            for stream in (False, True):
                body = {**CHAT, "model": "far", "stream": stream}
                answer = await client.post(path, json=body)
                assert answer.status_code == 402, answer.text
                assert "budget" in message_of(path, answer.json())


async def test_what_the_market_cannot_do_is_refused_and_not_bought(tmp_path: Path) -> None:
    async with buying(tmp_path) as bought, inside(None, bought) as client:
        body = {**CHAT, "model": "far", "logprobs": True}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert "cannot be bought" in answer.json()["error"]["message"]
        assert bought.agent.buying is not None
        assert not bought.agent.buying.asks


class _Breaking(EchoCompute):
    """An engine that dies after two tokens."""

    async def _write(self, prompt: Any) -> Any:
        count = 0
        async for chunk in super()._write(prompt):
            count += 1
            if count > 2:
                return
            yield chunk


@pytest.mark.parametrize("path", PATHS)
async def test_a_stream_that_breaks_off_says_so_in_its_own_shape(path: str) -> None:
    async with inside(_Breaking()) as client:
        answer = await client.post(path, json={**CHAT, "stream": True})
    assert answer.status_code == 200
    last = [line for line in answer.text.splitlines() if line][-1].removeprefix("data: ")
    assert "stopped in the middle" in message_of(path, json.loads(last))


async def test_a_client_that_goes_away_stops_the_engine() -> None:
    engine = EchoCompute(chunk_delay_s=0.01)
    body = {"model": "echo", "messages": [{"role": "user", "content": "word " * 30_000}]}
    async with gateway(engine) as url, httpx.AsyncClient() as client:
        async with client.stream("POST", f"{url}/api/chat", json=body) as answer:
            await anext(answer.aiter_lines())
            assert engine._gate.inside == 1
        while engine._gate.inside:  # noqa: ASYNC110 - an engine has no event for it.
            await anyio.sleep(0.01)
    assert engine.written < 30_000


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "", "localhost.:1"])
async def test_a_page_that_rebinds_a_name_gets_nothing(web: httpx.AsyncClient, host: str) -> None:
    answer = await web.get("/api/tags", headers={"host": host})
    assert answer.status_code == 403


async def test_only_pages_of_named_origins_may_ask() -> None:
    page = "http://chat.example"
    doors = Doors(origins=(page,))
    async with inside(EchoCompute(), doors=doors) as client:
        asked = await client.options(
            "/api/chat",
            headers={"origin": page, "access-control-request-method": "POST"},
        )
        assert asked.status_code == 204
        assert asked.headers["access-control-allow-origin"] == page
        answer = await client.get("/api/tags", headers={"origin": page})
        assert answer.headers["access-control-allow-origin"] == page
        other = await client.post("/api/chat", json=CHAT, headers={"origin": "http://evil.example"})
        assert other.status_code == 403
        assert "access-control-allow-origin" not in other.headers


async def test_with_keys_nobody_asks_without_one() -> None:
    doors = Doors(keys=("first", "second"))
    async with inside(EchoCompute(), doors=doors) as client:
        for headers, status in (
            ({}, 401),
            ({"authorization": "Bearer third"}, 401),
            ({"authorization": "Bearer second"}, 200),
            ({"x-api-key": "first"}, 200),
        ):
            answer = await client.get("/v1/models", headers=headers)
            assert answer.status_code == status
        assert (await client.head("/")).status_code == 200


async def test_more_than_it_takes_at_once_are_told_so() -> None:
    engine = EchoCompute(chunk_delay_s=3600)
    doors = Doors(concurrency=1)
    async with gateway(engine, doors=doors) as url, httpx.AsyncClient() as client:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: client.post(f"{url}/api/chat", json=CHAT, timeout=None))
            while not engine._gate.inside:  # noqa: ASYNC110 - an engine has no event for it.
                await anyio.sleep(0.01)
            answer = await client.post(f"{url}/v1/chat/completions", json=CHAT)
            group.cancel_scope.cancel()
        assert answer.status_code == 429
        assert answer.headers["retry-after"]


def test_a_file_of_keys_has_one_a_line() -> None:
    assert read_keys(["# mine", "", " one ", "two"]) == ("one", "two")
    with pytest.raises(ConfigurationError, match="no key"):
        read_keys(["# none"])


@pytest.mark.xdist_group("compute")
async def test_the_real_engine_streams_what_it_answers_at_once() -> None:
    engine = LlamaCppCompute(small_model())
    try:
        async with gateway(engine) as url, open_ai(url) as client:
            name = (await engine.models())[0].name
            asked: dict[str, Any] = {
                "model": name,
                "messages": [{"role": "user", "content": "Say hello."}],
                "max_tokens": 8,
                "temperature": 0,
            }
            answer = await client.chat.completions.create(**asked)
            stream = await client.chat.completions.create(**asked, stream=True)
            texts = [e.choices[0].delta.content or "" async for e in stream if e.choices]
        assert len(texts) > 4
        assert "".join(texts) == answer.choices[0].message.content
    finally:
        await engine.close()
