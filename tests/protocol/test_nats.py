"""The transport over a real broker that is killed, stopped, absent, rude, or in the wrong hands."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import nats
import nats.errors
import pytest

from coase.protocol.backends.broker import EmbeddedBroker
from coase.protocol.backends.nats import NatsConfig, NatsTransport
from coase.protocol.errors import ConfigurationError, TransportUnavailable
from coase.protocol.messages import ENVELOPE_SIZE_MAX_BYTES
from coase.protocol.subjects import WHOLE, inbox_subject
from tests.conformance.transport_suite import ALICE, BOB, INFERENCE, Mailbox
from tests.protocol.nats_world import (
    agent,
    bare_server,
    connected,
    eventually,
    impatient,
    stall,
    watchful,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.anyio


@pytest.fixture
async def broker() -> AsyncIterator[EmbeddedBroker]:
    broker = EmbeddedBroker()
    await broker.start()
    yield broker
    await broker.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# The broker dies, stalls, is absent


async def test_after_the_broker_was_killed_and_restarted_messages_flow_again(
    broker: EmbeddedBroker,
) -> None:
    config = impatient(broker.client_config())
    async with connected(config) as sender, connected(config) as receiver:
        inbox = Mailbox()
        await receiver.listen(BOB, inbox)
        await receiver.serve(BOB, INFERENCE, inbox)
        for round_number in range(2):
            os.kill(broker.pid, signal.SIGKILL)
            assert await broker.wait() == -signal.SIGKILL
            await eventually(lambda: not sender.health().connected)
            drops = sender.health().send_drops
            await sender.send(BOB, b"into the void")  # Neither raises nor waits.
            assert sender.health().send_drops == drops + 1
            await broker.start()
            await eventually(lambda: sender.health().connected and receiver.health().connected)
            await sender.send(BOB, b"back")
            await sender.ask(INFERENCE, b"asked", level=0, prefix=WHOLE)
            assert sorted(await inbox.has(2 * round_number + 2))[-1] == b"back"
            assert sender.health().reconnects == round_number + 1
        assert sorted(inbox.all) == [b"asked", b"asked", b"back", b"back"]


async def test_what_is_listened_to_while_the_broker_is_away_works_when_it_is_back(
    broker: EmbeddedBroker,
) -> None:
    config = impatient(broker.client_config())
    async with connected(config) as transport:
        before, during = Mailbox(), Mailbox()
        await transport.listen(ALICE, before)
        os.kill(broker.pid, signal.SIGKILL)
        await broker.wait()
        await eventually(lambda: not transport.health().connected)
        await transport.listen(BOB, during)
        await transport.forget(ALICE)
        await broker.start()
        await eventually(lambda: transport.health().connected)
        await transport.send(ALICE, b"forgotten meanwhile")
        await transport.send(BOB, b"new")
        assert await during.has(1) == [b"new"]
        assert before.all == []


async def test_a_stalled_broker_is_noticed_and_costs_neither_time_nor_memory(
    broker: EmbeddedBroker,
) -> None:
    limit = 512 * 1024
    config = replace(watchful(broker.client_config()), send_pending_max_bytes=limit)
    async with connected(config) as sender, connected(config) as receiver:
        inbox = Mailbox()
        await receiver.listen(BOB, inbox)
        await stall(broker)
        try:
            largest = bytes(ENVELOPE_SIZE_MAX_BYTES)
            async with asyncio.timeout(20):  # Far more than sockets take; it must not block.
                for _ in range(1000):
                    await sender.send(BOB, largest)
                    if (connection := sender._connection) is not None:
                        assert connection.pending_data_size <= limit + 2 * len(largest)
            assert sender.health().send_drops > 0
            await eventually(lambda: not sender.health().connected)
            assert "no ping" in " ".join(sender.health().errors)
        finally:
            os.kill(broker.pid, signal.SIGCONT)
        await eventually(lambda: sender.health().connected and receiver.health().connected)
        while b"awake" not in inbox.all:
            await sender.send(BOB, b"awake")
            await asyncio.sleep(0.01)


async def test_an_idle_connection_to_a_live_broker_is_kept(broker: EmbeddedBroker) -> None:
    config = replace(broker.client_config(), ping_interval_s=0.02)
    async with connected(config) as transport:
        await asyncio.sleep(0.5)  # Some twenty pings.
        assert transport.health().connected
        assert transport.health().reconnects == 0


async def test_a_cancelled_caller_does_not_harm_the_connection(broker: EmbeddedBroker) -> None:
    async with connected(broker.client_config()) as transport:
        inbox = Mailbox()
        await stall(broker)
        try:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await transport.listen(BOB, inbox)
        finally:
            os.kill(broker.pid, signal.SIGCONT)
        await transport.listen(ALICE, inbox)
        await transport.send(BOB, b"heard")
        assert await inbox.has(1) == [b"heard"]
        assert transport.health().reconnects == 0


async def test_the_broker_is_asked_after_it_was_told_and_not_before() -> None:
    """A pong proves that a subscription is in force only if the ping came behind it."""
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"max_payload":1048576}\r\n')
        while line := await reader.readline():
            heard.append(line.split()[0])
            if heard[-1] == b"PING":
                writer.write(b"PONG\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with connected(NatsConfig(urls=(f"nats://127.0.0.1:{port}",))) as transport:
            assert heard == [b"CONNECT", b"PING"]
            await transport.listen(BOB, Mailbox())
            assert heard == [b"CONNECT", b"PING", b"SUB", b"PING"]


async def test_without_a_broker_the_error_says_where_and_what_to_do() -> None:
    port = free_port()
    with pytest.raises(TransportUnavailable, match=rf"127\.0\.0\.1:{port}.*[Ss]tart the broker"):
        await NatsTransport.connect(NatsConfig(urls=(f"nats://127.0.0.1:{port}",)))


async def test_in_waiting_mode_the_broker_may_come_later() -> None:
    broker = EmbeddedBroker()
    await broker.start()
    config = impatient(broker.client_config())
    os.kill(broker.pid, signal.SIGKILL)
    await broker.wait()
    async with connected(config, must_connect=False) as transport:
        inbox = Mailbox()
        assert not transport.health().connected
        await transport.listen(BOB, inbox)
        await transport.send(BOB, b"dropped")
        await broker.start()
        await eventually(lambda: transport.health().connected)
        await transport.send(BOB, b"carried")
        assert await inbox.has(1) == [b"carried"]
        assert transport.health().reconnects == 0
    await broker.stop()


async def test_a_transport_may_close_while_the_broker_is_away_or_stalled(
    broker: EmbeddedBroker,
) -> None:
    config = impatient(broker.client_config())
    stalled = await NatsTransport.connect(replace(config, pong_wait_s=60))
    await stall(broker)
    await stalled.send(BOB, bytes(ENVELOPE_SIZE_MAX_BYTES))
    async with asyncio.timeout(10):
        await stalled.close()
    os.kill(broker.pid, signal.SIGCONT)
    absent = await NatsTransport.connect(config)
    os.kill(broker.pid, signal.SIGKILL)
    await eventually(lambda: not absent.health().connected)
    async with asyncio.timeout(10):
        await absent.close()


# Brokers that refuse, lie or babble


async def test_a_client_that_is_thrown_out_comes_back_when_it_is_let_in(tmp_path: Path) -> None:
    user = 'authorization {{ users: [{{ user: me, password: "{}" }}] }}'
    async with bare_server(tmp_path, user.format("old")) as server:
        config = impatient(NatsConfig(urls=(server.url,), user="me", password="old"))
        config = replace(config, ping_interval_s=3600)  # What the broker says is enough.
        async with connected(config) as transport:
            inbox = Mailbox()
            await transport.listen(BOB, inbox)
            await server.reload(user.format("new"))
            await eventually(lambda: not transport.health().connected)
            await eventually(lambda: "refused" in " ".join(transport.health().errors))
            await server.reload(user.format("old"))
            await eventually(lambda: transport.health().connected)
            await transport.send(BOB, b"let in again")
            assert await inbox.has(1) == [b"let in again"]


async def test_a_subject_that_the_broker_forbids_does_not_end_the_connection(
    tmp_path: Path,
) -> None:
    rules = f"""authorization {{ users: [{{ user: me, password: "pw", permissions: {{
        publish: {{ deny: "{inbox_subject("local", ALICE)}" }} }} }}] }}"""
    async with (
        bare_server(tmp_path, rules) as server,
        connected(NatsConfig(urls=(server.url,), user="me", password="pw")) as transport,
    ):
        inbox = Mailbox()
        await transport.listen(BOB, inbox)
        await transport.send(ALICE, b"forbidden")
        await transport.send(BOB, b"allowed")
        assert await inbox.has(1) == [b"allowed"]
        await eventually(lambda: "permissions violation" in " ".join(transport.health().errors))
        assert transport.health().reconnects == 0


async def test_a_broker_that_takes_no_full_envelope_is_refused(tmp_path: Path) -> None:
    async with bare_server(tmp_path, "max_payload: 1024") as server:
        with pytest.raises(ConfigurationError, match="max_payload to 65536"):
            await NatsTransport.connect(NatsConfig(urls=(server.url,)))


INFO = b'INFO {"server_id":"x","version":"2.0.0","max_payload":1048576,"auth_required":true}\r\n'


@pytest.mark.parametrize(
    "greeting",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
        b"INFO \r\n",
        b"INFO {\r\n",
        b"INFO []\r\n",
        b'INFO {"connect_urls": 7}\r\n',
        b'INFO {"max_payload": "many"}\r\nPONG\r\n',
        INFO + b"-ERR 'Authorization Violation'\r\n",
        INFO + b"\xff\xfe\x00\r\n" * 10,
        b"\xff" * 100_000,
    ],
)
async def test_a_stranger_at_the_brokers_address_is_an_error_and_no_more(greeting: bytes) -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        with contextlib.suppress(OSError):
            await writer.drain()
            await reader.read()
        writer.close()

    async with await asyncio.start_server(babble, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        config = impatient(NatsConfig(urls=(f"nats://127.0.0.1:{port}",), user="me", password="pw"))
        with pytest.raises((TransportUnavailable, ConfigurationError), match=str(port)):
            await NatsTransport.connect(config)


async def test_garbage_at_the_brokers_port_harms_nobody(broker: EmbeddedBroker) -> None:
    config = broker.client_config()
    async with connected(config) as sender, connected(config) as receiver:
        inbox = Mailbox()
        await receiver.listen(BOB, inbox)
        for garbage in (b"\0" * 5000, b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000), b"PUB a 9\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)
            writer.write(garbage)
            with contextlib.suppress(OSError):
                writer.write_eof()
                await reader.read()  # Until the broker hangs up.
            writer.close()
        await sender.send(BOB, b"unharmed")
        assert await inbox.has(1) == [b"unharmed"]
        assert sender.health().reconnects == receiver.health().reconnects == 0


async def test_an_oversize_message_from_elsewhere_is_dropped_and_counted(
    broker: EmbeddedBroker,
) -> None:
    config = broker.client_config()
    stranger = await nats.connect(config.urls[0], user=config.user, password=config.password)
    async with connected(config) as transport:
        inbox = Mailbox()
        await transport.listen(BOB, inbox)
        subject = inbox_subject("local", BOB)
        await stranger.publish(subject, bytes(ENVELOPE_SIZE_MAX_BYTES + 1))
        await stranger.publish(subject, b"small")
        assert await inbox.has(1) == [b"small"]
        assert transport.health().oversize_drops == 1
    await stranger.close()


async def test_what_comes_faster_than_it_is_handled_is_dropped_and_counted(
    broker: EmbeddedBroker,
) -> None:
    config = replace(broker.client_config(), inbound_pending_max=10)
    async with connected(config) as sender, connected(config) as receiver:
        inbox = Mailbox()
        await receiver.listen(BOB, inbox)
        for _ in range(500):
            await sender.send(BOB, b"tick")
        health = receiver.health()
        await eventually(lambda: len(inbox.all) + health.slow_consumer_drops == 500)
        assert health.slow_consumer_drops > 0
        assert "slow consumer" in " ".join(health.errors)
        await sender.send(BOB, b"still here")
        await eventually(lambda: inbox.all[-1] == b"still here")


# Several brokers, other schemes


@pytest.mark.parametrize("known", ["when we connect", "only later"])
async def test_a_cluster_is_found_from_one_of_its_brokers(tmp_path: Path, known: str) -> None:
    cluster = 'server_name: {name}\ncluster {{ name: c, listen: "127.0.0.1:-1", routes: [{to}] }}'
    async with (
        contextlib.AsyncExitStack() as stack,
        bare_server(tmp_path / "one", cluster.format(name="one", to="")) as first,
    ):
        config = impatient(NatsConfig(urls=(first.url,)))
        if known == "only later":
            transport = await stack.enter_async_context(connected(config))
        second = await stack.enter_async_context(
            bare_server(
                tmp_path / "two", cluster.format(name="two", to=f'"{first.ports["cluster"][0]}"')
            )
        )
        if known == "when we connect":
            while str(second.port) not in await _greeting(first.port):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            transport = await stack.enter_async_context(connected(config))
        await eventually(lambda: second.url in transport._discovered)
        inbox = Mailbox()
        await transport.listen(BOB, inbox)
        await first.end()
        await eventually(lambda: transport.health().where == second.url)
        await transport.send(BOB, b"by the other one")
        assert await inbox.has(1) == [b"by the other one"]


async def test_a_node_may_keep_to_the_broker_that_it_knows(tmp_path: Path) -> None:
    cluster = 'server_name: {name}\ncluster {{ name: c, listen: "127.0.0.1:-1", routes: [{to}] }}'
    async with bare_server(tmp_path / "one", cluster.format(name="one", to="")) as first:
        to = f'"{first.ports["cluster"][0]}"'
        async with bare_server(tmp_path / "two", cluster.format(name="two", to=to)) as second:
            while str(second.port) not in await _greeting(first.port):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            config = impatient(NatsConfig(urls=(first.url,), follow_cluster=False))
            async with connected(config) as transport:
                await first.end()
                await eventually(lambda: len(transport.health().errors) >= 2)
                assert transport.health().where == first.url
                assert not transport.health().connected


async def _greeting(port: int) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    line = await reader.readline()
    writer.close()
    await writer.wait_closed()
    return line.decode()


async def test_any_of_several_addresses_will_do(broker: EmbeddedBroker) -> None:
    config = broker.client_config()
    urls = (f"nats://127.0.0.1:{free_port()}", config.urls[0])
    async with connected(replace(config, urls=urls)) as transport:
        assert transport.health().where == config.urls[0]


# The client library passes aiohttp a parameter by its old name.
@pytest.mark.filterwarnings("ignore:parameter 'timeout' of type 'float':DeprecationWarning")
async def test_websocket_addresses_work(tmp_path: Path) -> None:
    text = 'websocket { host: "127.0.0.1", port: -1, no_tls: true }'
    async with bare_server(tmp_path, text) as server:
        port = server.ports["websocket"][0].rpartition(":")[2]
        async with connected(NatsConfig(urls=(f"ws://127.0.0.1:{port}",))) as transport:
            inbox = Mailbox()
            await transport.listen(BOB, inbox)
            await transport.send(BOB, b"over a websocket")
            assert await inbox.has(1) == [b"over a websocket"]


# The micro service


async def _ask(config: NatsConfig, subject: str) -> list[dict[str, Any]]:
    client = await nats.connect(config.urls[0], user=config.user, password=config.password)
    inbox = client.new_inbox()
    replies = await client.subscribe(inbox)
    await client.publish(subject, b"", reply=inbox)
    answers = []
    with contextlib.suppress(nats.errors.TimeoutError):
        while (message := await replies.next_msg(timeout=0.3)).data:
            answers.append(json.loads(message.data))
    await client.close()
    return answers


@pytest.mark.parametrize("verb", ["PING", "INFO", "STATS"])
async def test_each_node_answers_as_a_micro_service_without_endpoints(
    broker: EmbeddedBroker, verb: str
) -> None:
    config = impatient(broker.client_config())
    async with connected(config), connected(config) as second:
        for after_restart in (False, True):
            if after_restart:
                os.kill(broker.pid, signal.SIGKILL)
                await broker.wait()
                await broker.start()
                await eventually(lambda: second.health().reconnects == 1)
                await asyncio.sleep(0)
            answers: list[dict[str, Any]] = []
            deadline = time.monotonic() + 20
            while len(answers) < 2 and time.monotonic() < deadline:
                answers = await _ask(config, f"$SRV.{verb}")
            assert [answer["name"] for answer in answers] == ["coase", "coase"]
            assert len({answer["id"] for answer in answers}) == 2
            assert answers[0]["type"] == f"io.nats.micro.v1.{verb.lower()}_response"
            assert answers[0]["metadata"] == {"net": "local"}
            assert not answers[0].get("endpoints")


async def test_on_a_shared_broker_nobody_answers(broker: EmbeddedBroker) -> None:
    config = replace(broker.client_config(), micro=False)
    async with connected(config):
        assert await _ask(config, "$SRV.PING") == []


async def test_many_agents_of_one_node_share_what_they_have_in_common(
    broker: EmbeddedBroker,
) -> None:
    """One subscription a subject: the broker sends a request once, however many hear it here."""
    config = broker.client_config()
    async with connected(config) as buyer, connected(config) as node:
        inboxes = [Mailbox() for _ in range(50)]
        for number, inbox in enumerate(inboxes):
            await node.serve(agent(number), INFERENCE, inbox)
        await buyer.ask(INFERENCE, b"request", level=0, prefix=WHOLE)
        for inbox in inboxes:
            assert await inbox.has(1) == [b"request"]
        assert node.health().received == 1
