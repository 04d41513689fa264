"""Servers that die, babble, dawdle and refuse, seen through both HTTP backends.

The servers are the test's own, since no real one misbehaves on demand. The HTTP, and Ollama's
client library, are real.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import pytest

from coase.agents.compute.gate import Limits
from coase.agents.compute.ollama import OllamaCompute
from coase.agents.compute.openai import LINE_MAX_BYTES, OpenAICompute
from coase.agents.compute.ports import Compute, ComputeBusy, Prompt, PromptRefused
from coase.protocol.errors import ComputeFailed
from tests.conformance.compute_servers import Die, Handler, Request, Status, serving

pytestmark = pytest.mark.anyio

Open = Callable[[str, Limits], Compute]
Wire = Callable[..., bytes]
PROMPT = Prompt.ask("Say something", model="m", max_tokens=100)
PATIENCE = Limits(first_chunk_max_s=30, next_chunk_max_s=30)
IMPATIENCE = Limits(first_chunk_max_s=0.2, next_chunk_max_s=0.2)
_DEADLINE_S = 30


def open_openai(url: str, limits: Limits) -> Compute:
    return OpenAICompute(f"{url}/v1", limits=limits)


def open_ollama(url: str, limits: Limits) -> Compute:
    return OllamaCompute(url, limits=limits)


def openai_wire(text: str = "", *, done: bool = False, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": "stop" if done else None}
    event = b"data: " + json.dumps({"choices": [choice], **more}).encode() + b"\n\n"
    return event + b"data: [DONE]\n\n" if done else event


def ollama_wire(text: str = "", *, done: bool = False, **more: Any) -> bytes:
    message = {"role": "assistant", "content": text}
    line = {"model": "m", "created_at": "", "message": message, "done": done, **more}
    return json.dumps(line).encode() + b"\n"


@pytest.fixture(params=["openai", "ollama"])
def kind(request: pytest.FixtureRequest) -> tuple[Open, Wire]:
    if request.param == "openai":
        return open_openai, openai_wire
    return open_ollama, ollama_wire


async def read(compute: Compute) -> str:
    """Read an answer to its end, for what was read before the error."""
    texts: list[str] = []
    try:
        async with asyncio.timeout(_DEADLINE_S), aclosing(compute.stream(PROMPT)) as stream:
            async for chunk in stream:
                texts.append(chunk.text)
    except ComputeFailed as error:
        raise type(error)(f"after {''.join(texts)!r}: {error}") from error
    return "".join(texts)


async def answer_to(kind: tuple[Open, Wire], handler: Handler, limits: Limits = PATIENCE) -> str:
    async with serving(handler) as server:
        compute = kind[0](server.url, limits)
        try:
            return await read(compute)
        finally:
            await compute.close()


async def test_a_server_that_dies_in_the_middle_is_an_error_and_not_a_short_answer(
    kind: tuple[Open, Wire],
) -> None:
    async def dying(request: Request) -> AsyncGenerator[bytes, None]:
        yield kind[1]("half")
        await asyncio.sleep(0.05)  # So that it arrives before the connection is cut.
        raise Die

    with pytest.raises(ComputeFailed, match=r"after 'half'.*broke off"):
        await answer_to(kind, dying)


async def test_a_stream_without_an_end_is_an_error(kind: tuple[Open, Wire]) -> None:
    async def stopping(request: Request) -> AsyncGenerator[bytes, None]:
        yield kind[1]("half")

    with pytest.raises(ComputeFailed, match=r"after 'half'.*in the middle"):
        await answer_to(kind, stopping)


@pytest.mark.parametrize(
    "garbage",
    [b"<html>\n", b"data: {broken\n\n", b'data: "text"\n\n', b"[1, 2]\n", b"\xff\xfe\n"],
    ids=["html", "broken", "text", "list", "bytes"],
)
async def test_garbage_is_an_error_that_shows_it(kind: tuple[Open, Wire], garbage: bytes) -> None:
    async def babbling(request: Request) -> AsyncGenerator[bytes, None]:
        yield kind[1]("half")
        yield garbage
        yield kind[1](done=True)

    with pytest.raises(ComputeFailed, match=r"after 'half'.*does not speak"):
        await answer_to(kind, babbling)


async def test_an_endless_line_is_cut_off() -> None:
    async def endless(request: Request) -> AsyncGenerator[bytes, None]:
        yield b"data: "
        for _ in range(LINE_MAX_BYTES // 2**16 + 2):
            yield b"x" * 2**16
        await asyncio.sleep(_DEADLINE_S)

    with pytest.raises(ComputeFailed, match="a line of over"):
        await answer_to((open_openai, openai_wire), endless)


@pytest.mark.parametrize("in_stream", [True, False], ids=["stream", "status"])
async def test_an_error_of_the_server_is_told_on(kind: tuple[Open, Wire], in_stream: bool) -> None:
    async def failing(request: Request) -> AsyncGenerator[bytes, None]:
        error = {"error": "the GPU is on fire"}
        if not in_stream:
            raise Status(500, error)
        yield kind[1]("half")
        yield b"data: " * (kind[0] is open_openai) + json.dumps(error).encode() + b"\n"

    with pytest.raises(ComputeFailed, match="the GPU is on fire"):
        await answer_to(kind, failing)


@pytest.mark.parametrize(
    ("code", "error"),
    [(404, PromptRefused), (400, PromptRefused), (429, ComputeBusy), (503, ComputeBusy)],
)
async def test_refusals_say_whether_to_ask_again(
    kind: tuple[Open, Wire], code: int, error: type[ComputeFailed]
) -> None:
    async def refusing(request: Request) -> AsyncGenerator[bytes, None]:
        raise Status(code, {"error": "no"})
        yield b""

    with pytest.raises(error):
        await answer_to(kind, refusing)


async def test_a_slow_first_token_is_waited_for(kind: tuple[Open, Wire]) -> None:
    async def slow(request: Request) -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(0.3)
        yield kind[1]("worth the wait")
        yield kind[1](done=True)

    patient = Limits(first_chunk_max_s=30, next_chunk_max_s=30)
    assert await answer_to(kind, slow, patient) == "worth the wait"


@pytest.mark.parametrize("first", [True, False], ids=["first", "next"])
async def test_silence_ends_in_an_error_that_names_its_cause_and_lets_go(
    kind: tuple[Open, Wire], first: bool
) -> None:
    async def silent(request: Request) -> AsyncGenerator[bytes, None]:
        if not first:
            yield kind[1]("half")
        await asyncio.sleep(_DEADLINE_S)
        yield b""

    # Only the wait in question is short, or a busy machine would cut off the other one.
    limits = Limits(
        first_chunk_max_s=0.2 if first else _DEADLINE_S,
        next_chunk_max_s=_DEADLINE_S if first else 0.2,
    )
    which = "first" if first else "next"
    async with serving(silent) as server:
        compute = kind[0](server.url, limits)
        with pytest.raises(ComputeFailed, match=f"silent: its {which} token"):
            await read(compute)
        async with asyncio.timeout(_DEADLINE_S):
            await server.requests[0].gone.wait()
        await compute.close()


@pytest.mark.parametrize("how", ["closed", "cancelled"])
async def test_the_server_sees_that_nobody_reads_any_more(
    kind: tuple[Open, Wire], how: str
) -> None:
    async def chattering(request: Request) -> AsyncGenerator[bytes, None]:
        while True:
            yield kind[1]("and ")
            await asyncio.sleep(0.01)

    begun = asyncio.Event()

    async def listen(compute: Compute) -> None:
        async with aclosing(compute.stream(PROMPT)) as stream:
            async for _ in stream:
                begun.set()
                if how == "closed":
                    return

    async with serving(chattering) as server:
        compute = kind[0](server.url, PATIENCE)
        listening = asyncio.create_task(listen(compute))
        await begun.wait()
        if how == "cancelled":
            listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        async with asyncio.timeout(_DEADLINE_S):
            await server.requests[0].gone.wait()
        await compute.close()


async def test_two_at_once_are_not_mixed_up(kind: tuple[Open, Wire]) -> None:
    both = asyncio.Barrier(2)

    async def naming(request: Request) -> AsyncGenerator[bytes, None]:
        name = request.body["messages"][0]["content"]
        await both.wait()  # Neither is answered before both are there.
        for _ in range(5):
            yield kind[1](name)
            await asyncio.sleep(0)
        yield kind[1](done=True)

    async with serving(naming) as server:
        compute = kind[0](server.url, PATIENCE)
        async with asyncio.timeout(_DEADLINE_S):
            answers = await asyncio.gather(
                *(compute.complete(Prompt.ask(name, model="m")) for name in "ab")
            )
        assert [answer.text for answer in answers] == ["aaaaa", "bbbbb"]
        await compute.close()


async def test_nobody_there_is_said_in_plain_words(kind: tuple[Open, Wire]) -> None:
    with socket.socket() as taken:  # Bound and not listening: nobody else can answer there.
        taken.bind(("127.0.0.1", 0))
        compute = kind[0](f"http://127.0.0.1:{taken.getsockname()[1]}", PATIENCE)
        with pytest.raises(ComputeFailed, match="cannot be reached"):
            await read(compute)
        with pytest.raises(ComputeFailed, match="cannot be reached"):
            await compute.models()
        await compute.close()


async def test_a_server_without_counts_is_counted_by_its_pieces(kind: tuple[Open, Wire]) -> None:
    async def terse(request: Request) -> AsyncGenerator[bytes, None]:
        for word in ("one ", "two ", "three"):
            yield kind[1](word)
        yield kind[1](done=True)

    async with serving(terse) as server:
        compute = kind[0](server.url, PATIENCE)
        usage = (await compute.complete(PROMPT)).usage
        assert usage.output_tokens == 3
        assert usage.input_tokens > 0
        await compute.close()


async def test_what_was_asked_is_what_is_sent(kind: tuple[Open, Wire]) -> None:
    async def polite(request: Request) -> AsyncGenerator[bytes, None]:
        yield kind[1](done=True)

    prompt = Prompt.ask(
        "hello", system="be brief", model="m", seed=5, stop=("END",), temperature=0.5, max_tokens=9
    )
    async with serving(polite) as server:
        compute = kind[0](server.url, PATIENCE)
        await compute.complete(prompt)
        body = server.requests[0].body
        await compute.close()
    settings = body if kind[0] is open_openai else body["options"]
    assert [(m["role"], m["content"]) for m in body["messages"]] == [
        ("system", "be brief"),
        ("user", "hello"),
    ]
    assert body["model"] == "m"
    assert body["stream"] is True
    assert (settings["seed"], settings["stop"], settings["temperature"]) == (5, ["END"], 0.5)
    assert settings["max_tokens" if kind[0] is open_openai else "num_predict"] == 9


async def test_ollama_prefers_what_is_loaded_then_small_and_never_the_cloud() -> None:
    models = {"big": 900, "loaded": 500, "small": 100, "embeds": 10, "far:cloud": 1}

    async def ollama(request: Request) -> AsyncGenerator[bytes, None]:
        def entry(name: str) -> dict[str, Any]:
            return {"model": name, "name": name, "size": models[name], "digest": "d" + name}

        match request.path:
            case "/api/tags":
                answer: Any = {"models": [entry(name) for name in models]}
            case "/api/ps":
                answer = {"models": [entry("loaded")]}
            case _:
                ability = "embedding" if request.body["model"] == "embeds" else "completion"
                answer = {"capabilities": [ability], "model_info": {"llama.context_length": 77}}
        yield json.dumps(answer).encode()

    async with serving(ollama) as server:
        compute = OllamaCompute(server.url)
        found = await compute.models()
        assert [info.name for info in found] == ["loaded", "small", "big", "embeds"]
        assert [info.loaded for info in found] == [True, False, False, False]
        assert [info.capabilities for info in found[2:]] == [("completion",), ("embedding",)]
        assert found[0].context_tokens == 77
        loaded = await compute.estimate(Prompt.ask("x", model="loaded"))
        cold = await compute.estimate(Prompt.ask("x", model="big"))
        assert loaded.loading_ms == 0
        assert cold.expected_ms >= loaded.expected_ms
        with pytest.raises(PromptRefused, match="ollama pull gone"):
            await compute.estimate(Prompt.ask("x", model="gone"))
        await compute.close()
