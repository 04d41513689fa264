"""One machine's chain over the broker: whole answers, a fair line, and nobody in its place."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from coase.agents import bridge
from coase.agents.bridge import METHODS, ChainDesk, ChainWindow, refused
from coase.escrow.backends.devchain_http import HttpServer
from coase.escrow.backends.evm.chain import EvmChain
from coase.escrow.ports import MemoryTxStore
from coase.protocol.backends.broker import EmbeddedBroker
from coase.protocol.backends.calls import Calls
from coase.protocol.errors import ChainUnavailable
from coase.protocol.identity import Identity

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from coase.protocol.backends.calls import Question

pytestmark = [pytest.mark.anyio, pytest.mark.xdist_group("bridge")]

HOLDER = Identity(b"\x11" * 32)
STRANGER = Identity(b"\x12" * 32)
NODE = "0123456789abcdef"
PATIENCE_S = 60


def call(method: str = "eth_chainId", *params: Any, call_id: int = 1) -> bytes:
    return json.dumps(
        {"jsonrpc": "2.0", "id": call_id, "method": method, "params": params}
    ).encode()


class Upstream:
    """A chain that answers what a test wants, when it wants."""

    def __init__(self) -> None:
        self.answer = b'{"jsonrpc":"2.0","id":1,"result":"0x7a69"}'
        self.seen: list[bytes] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def post(self, body: bytes) -> bytes:
        self.seen.append(body)
        await self.gate.wait()
        return self.answer


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[EmbeddedBroker]:
    embedded = EmbeddedBroker(state_dir=tmp_path / "broker")
    await embedded.start()
    yield embedded
    await embedded.stop()


@contextlib.asynccontextmanager
async def calling(broker: EmbeddedBroker) -> AsyncIterator[Calls]:
    calls = await Calls.connect(broker.client_config())
    try:
        yield calls
    finally:
        await calls.close()


@contextlib.asynccontextmanager
async def beside(work: Callable[[], Any]) -> AsyncIterator[None]:
    task = asyncio.create_task(work())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def desk(
    broker: EmbeddedBroker, upstream: Upstream, *, identity: Identity = HOLDER
) -> AsyncIterator[str]:
    """A machine with a chain, and the URL at which another machine sees it."""
    server = HttpServer(upstream.post)
    rpc = f"http://127.0.0.1:{await server.start(0)}"
    try:
        async with (
            calling(broker) as held,
            beside(ChainDesk(held, "x", rpc, identity=identity).run),
        ):
            yield rpc
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def window(broker: EmbeddedBroker, *, node: str = NODE) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        calling(broker) as calls,
        ChainWindow(calls, "x", node=node, holder=HOLDER.address).open() as url,
        httpx.AsyncClient(
            base_url=url, headers={"Content-Type": "application/json"}, timeout=PATIENCE_S
        ) as client,
    ):
        yield client


async def test_a_client_sees_the_chain_itself(broker: EmbeddedBroker) -> None:
    upstream = Upstream()
    async with desk(broker, upstream), window(broker) as client:
        answer = await client.post("/", content=call())
        assert answer.content == upstream.answer
        chain = await EvmChain.connect(str(client.base_url), store=MemoryTxStore())
        assert chain.chain_id == 31337
        await chain.close()


async def test_a_large_answer_travels_in_parts(broker: EmbeddedBroker) -> None:
    upstream = Upstream()
    upstream.answer = b'"' + b"x" * (5 * bridge.PART_SIZE_MAX_BYTES) + b'"'
    async with desk(broker, upstream), window(broker) as client:
        assert (await client.post("/", content=call())).content == upstream.answer


async def test_what_is_too_large_says_what_to_do(
    broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream = Upstream()
    monkeypatch.setattr(bridge, "ANSWER_SIZE_MAX_BYTES", 100)
    monkeypatch.setattr(bridge, "REQUEST_SIZE_MAX_BYTES", 1000)
    upstream.answer = b"x" * 101
    async with desk(broker, upstream), window(broker) as client:
        told = (await client.post("/", content=call(call_id=7))).json()
        assert told["id"] == 7
        assert "smaller range" in told["error"]["message"]
        told = (await client.post("/", content=call("eth_call", "0" * 1000))).json()
        assert "at most 1000 bytes" in told["error"]["message"]


async def test_without_the_holder_clients_see_an_endpoint_that_is_down(
    broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "INTEREST_WAIT_MAX_S", 0.2)
    async with window(broker) as client:
        answer = await client.post("/", content=call(call_id=3))
        assert answer.status_code == 503
        assert answer.reason_phrase == "The machine that holds the chain is away"
        assert answer.json()["id"] == 3
        with pytest.raises(ChainUnavailable, match="machine that holds the chain is away"):
            await EvmChain.connect(str(client.base_url), store=MemoryTxStore())
        monkeypatch.setattr(bridge, "INTEREST_WAIT_MAX_S", PATIENCE_S)
        async with desk(broker, Upstream()):  # It is back, and nobody need start again.
            assert (await client.post("/", content=call())).status_code == 200


async def test_a_chain_that_is_away_is_said(broker: EmbeddedBroker) -> None:
    async with (
        calling(broker) as held,
        beside(ChainDesk(held, "x", "http://127.0.0.1:9", identity=HOLDER).run),
        window(broker) as client,
    ):
        answer = await client.post("/", content=call())
        assert (answer.status_code, answer.reason_phrase) == (
            503,
            "The chain is being started again",
        )


async def test_nobody_else_can_say_what_is_on_the_chain(
    broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    liar = Upstream()
    liar.answer = b'{"jsonrpc":"2.0","id":1,"result":"0x1"}'
    honest = Upstream()
    honest.gate.clear()  # The lie comes first.
    async with desk(broker, liar, identity=STRANGER), window(broker) as client:
        async with desk(broker, honest):
            asked = asyncio.create_task(client.post("/", content=call()))
            async with asyncio.timeout(PATIENCE_S):
                while not liar.seen or not honest.seen:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            honest.gate.set()
            assert (await asked).content == honest.answer
        monkeypatch.setattr(bridge, "ANSWER_WAIT_MAX_S", 0.3)
        assert (await client.post("/", content=call())).status_code == 503


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"garbage", -32600),
        (b"[" * 100_000, -32600),
        (b"[]", -32600),
        (b"[1]", -32601),
        (call("coase_mine"), -32601),
        (call("eth_sendTransaction"), -32601),
        (call("debug_traceTransaction"), -32601),
        (b'{"id": 1, "method": ["eth_call"]}', -32601),
        (b"[" + b",".join([call()] * 101) + b"]", -32600),
    ],
)
def test_what_no_other_machine_may_ask(body: bytes, code: int) -> None:
    answer = refused(body)
    assert answer is not None
    assert json.loads(answer)["error"]["code"] == code


def test_every_other_call_may_be_asked() -> None:
    for method in METHODS:
        assert refused(call(method)) is None
    assert refused(b"[" + call() + b"," + call("eth_call") + b"]") is None


async def test_machines_take_turns(broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "AT_ONCE_MAX", 1)
    upstream = Upstream()
    upstream.gate.clear()
    many, one = call(call_id=1), call(call_id=2)
    waiting: dict[str, list[object]] = defaultdict(list)
    take = ChainDesk._take

    def counted(self: ChainDesk, question: Question) -> None:
        waiting[question.body[:16].decode()].append(question)
        take(self, question)

    monkeypatch.setattr(ChainDesk, "_take", counted)
    async with (
        desk(broker, upstream),
        window(broker) as greedy,
        window(broker, node="f" * 16) as modest,
    ):
        line = [asyncio.create_task(greedy.post("/", content=many)) for _ in range(20)]
        async with asyncio.timeout(PATIENCE_S):
            while not upstream.seen:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        last = asyncio.create_task(modest.post("/", content=one))
        async with asyncio.timeout(PATIENCE_S):
            while len(waiting["f" * 16]) < 1 or len(waiting[NODE]) < 19:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        upstream.gate.set()
        for answer in await asyncio.gather(*line, last):
            assert answer.status_code == 200
        # Whoever waits with one question waits for one or two of another's, not for twenty.
        assert upstream.seen.index(one) <= 2


async def test_a_line_has_an_end(broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "AT_ONCE_MAX", 1)
    monkeypatch.setattr(bridge, "WAITING_MAX", 2)
    upstream = Upstream()
    upstream.gate.clear()
    async with desk(broker, upstream), window(broker) as client:
        asked = [asyncio.create_task(client.post("/", content=call())) for _ in range(9)]
        done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        refusal = done.pop().result()
        assert (refusal.status_code, refusal.reason_phrase) == (
            503,
            "The machine that holds the chain is busy",
        )
        upstream.gate.set()
        answers = await asyncio.gather(*asked)
        assert sum(answer.status_code == 200 for answer in answers) >= 2
