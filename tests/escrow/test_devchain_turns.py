"""One client cannot keep the embedded chain from the others: neither its time nor its doors."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from coase.escrow.backends import devchain_http, devchain_rpc
from coase.escrow.backends.devchain_http import HttpServer
from coase.escrow.backends.devchain_node import DevNode
from coase.escrow.backends.devchain_turns import Turns

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.anyio

START_S = 1_800_000_000
# JUMPDEST, PUSH1 0, JUMP
ENDLESS = {"method": "eth_call", "params": [{"data": "0x5b600056", "gas": hex(2**62)}, "latest"]}
NUMBER: dict[str, Any] = {"method": "eth_blockNumber", "params": []}


OPEN: list[Client] = []


class Client:
    """A connection of its own, kept open."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, url: str) -> Client:
        client = cls(*await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2])))
        OPEN.append(client)
        return client

    async def close(self) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()

    async def ask(self, request: Any) -> Any:
        """Post JSON and return the answer."""
        body = json.dumps(request).encode()
        head = f"POST / HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        self.writer.write(head.encode() + b"\r\n\r\n" + body)
        answer = await self.reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return json.loads(await self.reader.readexactly(length))

    async def is_closed(self) -> bool:
        """Return, once it is closed by the other side, that it is."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionResetError:
            return True


@pytest.fixture(autouse=True)
async def hang_up() -> AsyncIterator[None]:
    yield
    while OPEN:
        await OPEN.pop().close()


@pytest.fixture
async def node() -> AsyncIterator[DevNode]:
    node = DevNode(manual_time_s=START_S, seed=b"turns")
    await node.serve()
    yield node
    await node.close()


@asynccontextmanager
async def beside(*work: Any) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def call(request: dict[str, Any], ident: int = 1) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": ident, **request}


async def test_a_light_client_waits_for_one_running_call_of_a_flood(
    node: DevNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devchain_rpc, "CALL_CPU_MAX_S", 0.02)
    ran = 0
    one = node.rpc._one

    def count(request: Any) -> dict[str, Any]:
        nonlocal ran
        ran += request.get("method") == "eth_call"
        return one(request)

    monkeypatch.setattr(node.rpc, "_one", count)
    light = await Client.to(node.url)
    await light.ask(call(NUMBER))
    batch = [call(ENDLESS, ident) for ident in range(20)]

    async def flood() -> None:
        while True:  # A new connection each time, as most who mean no good.
            heavy = await Client.to(node.url)
            await heavy.ask(batch)
            await heavy.close()

    waited: list[int] = []
    async with beside(*(flood() for _ in range(12))):
        while ran < 30:  # noqa: ASYNC110 - it runs in this very loop, and tells nobody.
            await asyncio.sleep(0)
        for _ in range(10):
            before = ran
            assert (await light.ask(call(NUMBER)))["result"] == "0x1"
            waited.append(ran - before)
    # The one that runs while the request comes in, and the one while it is read.
    assert max(waited) <= 2, waited


async def test_a_call_without_end_is_cut_off_and_leaves_the_state_as_it_was(
    node: DevNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await Client.to(node.url)
    balance = call({"method": "eth_getBalance", "params": [node.facts()["deployer"]]})
    before = await client.ask(balance)
    monkeypatch.setattr(devchain_rpc, "CALL_CPU_MAX_S", 0.02)
    for method in ("eth_call", "eth_estimateGas"):
        for tag in ("latest", "pending"):
            params = [{"data": "0x5b600056"}, tag]
            answer = await client.ask(call({"method": method, "params": params}))
            assert answer["error"]["message"] == "the call takes too long"
    assert await client.ask(balance) == before
    node.engine.seal()
    assert await client.ask(balance) == before


async def test_a_batch_stands_in_line_for_each_of_its_calls(node: DevNode) -> None:
    one, other = await Client.to(node.url), await Client.to(node.url)
    numbers = [call(NUMBER, ident) for ident in range(500)]
    first, second = await asyncio.gather(one.ask(numbers), other.ask(numbers))
    assert [answer["id"] for answer in first] == list(range(500))
    assert first == second


async def test_turns_go_to_whoever_has_used_least_and_a_newcomer_is_no_exception() -> None:
    now_s = 0.0
    turns, order = Turns(lambda: now_s), []

    async def client(name: str, spends: list[float]) -> None:
        nonlocal now_s
        for spent_s in spends:
            async with turns.turn():
                order.append(name)
                now_s += spent_s

    light = asyncio.ensure_future(client("light", [0.01] * 4))
    heavy = asyncio.ensure_future(client("heavy", [1.0] * 4))
    while order.count("heavy") < 2:  # noqa: ASYNC110 - nobody tells.
        await asyncio.sleep(0)
    late = asyncio.ensure_future(client("late", [1.0] * 2))
    await asyncio.gather(light, heavy, late)
    lights = [place for place, name in enumerate(order) if name == "light"]
    assert max(b - a for a, b in pairwise(lights)) <= 2, order
    # "late" began level with the heavy one: being new is no way past the light one.
    assert order[order.index("late") - 1] == "light", order
    assert sorted(order) == ["heavy"] * 4 + ["late"] * 2 + ["light"] * 4


async def test_what_nobody_waits_for_any_more_is_not_computed(
    node: DevNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = 0
    one = node.rpc._one

    def count(request: Any) -> dict[str, Any]:
        nonlocal ran
        ran += 1
        return one(request)

    monkeypatch.setattr(node.rpc, "_one", count)
    monkeypatch.setattr(devchain_rpc, "TURN_MIN_S", 0.0)
    gone, stays = await Client.to(node.url), await Client.to(node.url)
    asking = asyncio.ensure_future(gone.ask([call(NUMBER)] * 1_000))
    while not ran:  # noqa: ASYNC110 - it runs in this very loop, and tells nobody.
        await asyncio.sleep(0)
    asking.cancel()
    await gone.close()
    before = ran
    await stays.ask([call(NUMBER)] * 100)
    assert ran < before + 300


async def test_a_turn_that_is_given_up_goes_to_the_next() -> None:
    turns, order = Turns(), []
    gate = asyncio.Event()

    async def client(name: str, *, waits: bool = False) -> None:
        async with turns.turn():
            order.append(name)
            if waits:
                await gate.wait()

    first = asyncio.ensure_future(client("first", waits=True))
    await asyncio.sleep(0)
    gone, last = asyncio.ensure_future(client("gone")), asyncio.ensure_future(client("last"))
    await asyncio.sleep(0)
    gone.cancel()
    gate.set()
    await asyncio.gather(first, last)
    assert order == ["first", "last"]
    failing = asyncio.ensure_future(client("failing", waits=True))
    gate.clear()
    await asyncio.sleep(0)
    failing.cancel()
    await asyncio.gather(failing, return_exceptions=True)
    await client("after")
    assert order[-1] == "after"


async def test_when_all_doors_are_taken_the_idlest_makes_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devchain_http, "CONNECTIONS_MAX", 4)
    busy, go_on = asyncio.Event(), asyncio.Event()

    async def answer(body: bytes) -> bytes:
        if json.loads(body) == "slow":
            busy.set()
            await go_on.wait()
        return body

    server = HttpServer(answer)
    url = f"http://127.0.0.1:{await server.start(0)}"
    try:
        served, slow = await Client.to(url), await Client.to(url)
        assert await served.ask("hello") == "hello"
        waits = asyncio.ensure_future(slow.ask("slow"))
        await busy.wait()
        silent = [await Client.to(url) for _ in range(2)]
        for newcomer in range(2):
            client = await Client.to(url)
            assert await client.ask(newcomer) == newcomer
            assert await silent[newcomer].is_closed()
        # Nobody is left that never asked: now it is whoever asked longest ago.
        assert await (await Client.to(url)).ask("third") == "third"
        assert await served.is_closed()
        go_on.set()
        assert await waits == "slow", "what is being answered is not idle"
    finally:
        await server.close()
