"""Brokers of several machines: members find each other, and nobody else hears a word."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import socket
import ssl
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509

from coase.protocol.backends import broker as broker_module
from coase.protocol.backends import broker_config
from coase.protocol.backends.broker import EmbeddedBroker, MeshConfig
from coase.protocol.backends.broker_config import NODES_MAX, route_address, route_addresses
from coase.protocol.backends.broker_routes import _microseconds
from coase.protocol.backends.mesh_tls import LIFE_S, MeshAuthority, MeshFiles, prove_peer
from coase.protocol.backends.nats import NatsConfig
from coase.protocol.errors import ConfigurationError, RemoteProtocolError, TransportUnavailable
from coase.protocol.joincode import JoinCode
from tests.conformance.transport_suite import ALICE, BOB, Mailbox
from tests.protocol.nats_world import (
    DEADLINE_S,
    bare_server,
    connected,
    eventually,
    impatient,
    stall,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from coase.protocol.backends.nats import NatsTransport

pytestmark = pytest.mark.anyio

CODE = JoinCode.of(b"sixteen secrets!")
OTHER = JoinCode.of(b"another sixteen!")
DAY_S = 86_400
REFUSED = "TLS route handshake error"


class Lan:
    """Machines of one local network, all of them this one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.brokers: list[EmbeddedBroker] = []

    def files(self, name: str, code: JoinCode, issued_s: int | None = None) -> MeshFiles:
        now_s = int(time.time()) if issued_s is None else issued_s
        return MeshAuthority(code).issue(name, [], now_s=now_s).write(self.root / name / "tls")

    def broker(
        self,
        name: str,
        *,
        code: JoinCode = CODE,
        net: str = CODE.net,
        issued_s: int | None = None,
        **mesh: Any,
    ) -> EmbeddedBroker:
        """One more machine. All believe to be in one net, whatever code they have."""
        if "open" not in mesh:
            mesh["tls"] = self.files(name, code, issued_s)
        config = MeshConfig(node_id=name, **({"listen": "127.0.0.1"} | mesh))
        broker = EmbeddedBroker(net=net, state_dir=self.root / name / "broker", mesh=config)
        self.brokers.append(broker)
        return broker

    async def started(self, *names: str, **how: Any) -> list[EmbeddedBroker]:
        brokers = [self.broker(name, **how) for name in names]
        await asyncio.gather(*(broker.start() for broker in brokers))
        return brokers

    def log(self, name: str) -> str:
        return (self.root / name / "broker" / "broker.log").read_text()

    def config(self, name: str) -> str:
        return (self.root / name / "broker" / "broker.conf").read_text()


@pytest.fixture
async def lan(tmp_path: Path) -> AsyncIterator[Lan]:
    lan = Lan(tmp_path)
    yield lan
    await asyncio.gather(*(broker.stop() for broker in lan.brokers))


def at(broker: EmbeddedBroker) -> str:
    return f"127.0.0.1:{broker.route_port}"


async def peers(broker: EmbeddedBroker) -> set[str]:
    return {route.node_id for route in await broker.routes()}


async def joined(broker: EmbeddedBroker, *names: str) -> None:
    """Wait until exactly these are connected."""
    async with asyncio.timeout(DEADLINE_S):
        while await peers(broker) != set(names):  # noqa: ASYNC110 - it has no event of its own.
            await asyncio.sleep(0.01)


async def reaches(sender: NatsTransport, inbox: Mailbox) -> None:
    """Send to Bob until it arrives: interest takes a moment to spread."""
    before = len(inbox.all)
    async with asyncio.timeout(DEADLINE_S):
        while len(inbox.all) == before:
            await sender.send(BOB, b"are you there")
            await asyncio.sleep(0.01)


# Members


async def test_requests_and_answers_pass_between_two(lan: Lan) -> None:
    one, other = await lan.started("one", "other")
    assert await one.routes() == ()
    await one.set_routes([at(other)])
    await joined(one, "other")
    await joined(other, "one")
    (there,), (here,) = await one.routes(), await other.routes()
    assert (there.address, there.dialled, here.dialled) == (at(other), True, False)
    assert there.server_id != here.server_id
    async with (
        connected(one.client_config()) as buyer,
        connected(other.client_config()) as seller,
    ):
        asked, answered = Mailbox(), Mailbox()
        await seller.listen(BOB, asked)
        await buyer.listen(ALICE, answered)
        await reaches(buyer, asked)
        async with asyncio.timeout(DEADLINE_S):
            while not answered.all:
                await seller.send(ALICE, b"here I am")
                await asyncio.sleep(0.01)


async def test_who_joins_one_of_them_is_joined_with_all(lan: Lan) -> None:
    first, *others = await lan.started(*(f"node-{number}" for number in range(10)))
    for broker in others:
        await broker.set_routes([at(first)])
    names = {f"node-{number}" for number in range(10)}
    for number, broker in enumerate([first, *others]):
        await joined(broker, *names - {f"node-{number}"})
    async with (
        connected(others[0].client_config()) as sender,
        connected(others[-1].client_config()) as receiver,
    ):
        inbox = Mailbox()
        await receiver.listen(BOB, inbox)
        await reaches(sender, inbox)


async def test_two_meshes_merge(lan: Lan) -> None:
    a, b, c, d = await lan.started("a", "b", "c", "d")
    await a.set_routes([at(b)])
    await c.set_routes([at(d)])
    await joined(b, "a")
    await joined(d, "c")
    await a.set_routes([at(b), at(c)])
    for name, broker in (("a", a), ("b", b), ("c", c), ("d", d)):
        await joined(broker, *{"a", "b", "c", "d"} - {name})


async def test_a_killed_broker_comes_back_to_the_mesh_on_its_port(lan: Lan) -> None:
    a, b, c = await lan.started("a", "b", "c")
    await a.set_routes([at(b), at(c)])
    await b.set_routes([at(a), at(c)])
    await joined(c, "a", "b")
    async with (
        connected(impatient(c.client_config())) as sender,
        connected(impatient(b.client_config())) as receiver,
    ):
        inbox, port = Mailbox(), b.route_port
        await receiver.listen(BOB, inbox)
        await reaches(sender, inbox)
        os.kill(b.pid, signal.SIGKILL)
        await b.wait()
        await joined(a, "c")
        with pytest.raises(TransportUnavailable, match="does not run"):
            await b.routes()
        await b.start()
        assert b.route_port == port
        await joined(a, "b", "c")
        await joined(c, "a", "b")
        await reaches(sender, inbox)


async def test_one_that_falls_silent_is_missed(lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_config, "PING_INTERVAL_S", 1)
    monkeypatch.setattr(broker_config, "PINGS_MAX", 1)
    a, b = await lan.started("a", "b")
    await a.set_routes([at(b)])
    await joined(b, "a")
    await stall(b)
    await joined(a)
    os.kill(b.pid, signal.SIGCONT)
    await joined(a, "b")


async def test_routes_in_both_directions_and_to_oneself_become_one(lan: Lan) -> None:
    a, b = await lan.started("a", "b")
    await a.set_routes([at(a), at(b)])
    await b.set_routes([at(b), at(a)])
    await joined(a, "b")
    await joined(b, "a")
    async with asyncio.timeout(DEADLINE_S):
        while len(await a.routes()) + len(await b.routes()) != 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


# Leaving


async def test_a_route_that_both_sides_removed_carries_nothing(lan: Lan) -> None:
    a, b = await lan.started("a", "b")
    await a.set_routes([at(b)])
    await b.set_routes([at(a)])
    async with connected(a.client_config()) as sender, connected(b.client_config()) as receiver:
        inbox, own = Mailbox(), Mailbox()
        await receiver.listen(BOB, inbox)
        await sender.listen(ALICE, own)
        await reaches(sender, inbox)
        await a.set_routes([])
        await b.set_routes([])
        await joined(a)
        await joined(b)
        heard = len(inbox.all)
        await sender.send(BOB, b"after the end")
        await sender.send(ALICE, b"to oneself")
        await own.has(1)
        await receiver.send(BOB, b"last")
        assert (await inbox.has(heard + 1))[heard:] == [b"last"]


async def test_the_same_list_again_changes_nothing(lan: Lan) -> None:
    a, b = await lan.started("a", "b")
    await a.set_routes([at(b), at(b)])
    await joined(a, "b")
    reloads = lan.log("a").count("Reloaded server configuration")
    await a.set_routes([at(b)])
    assert lan.log("a").count("Reloaded server configuration") == reloads == 1


async def test_a_list_for_a_broker_that_does_not_run_waits_for_its_start(lan: Lan) -> None:
    a, b = lan.broker("a"), lan.broker("b")
    await b.start()
    await a.set_routes([at(b)])
    await a.start()
    await joined(a, "b")


async def test_a_list_that_the_broker_refuses_leaves_the_old_one(
    lan: Lan, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await lan.started("a", "b")
    await a.set_routes([at(b)])
    monkeypatch.setattr(broker_module, "cluster_block", lambda *_, **__: ("cluster {{",))
    with pytest.raises(ConfigurationError, match="refused the file"):
        await a.set_routes([])
    monkeypatch.undo()
    await a.reload()
    assert f'routes: ["nats://{at(b)}"]' in lan.config("a")
    await joined(a, "b")


# Certificates


async def test_a_renewed_certificate_is_shown_and_routes_stay(lan: Lan) -> None:
    a, b = await lan.started("a", "b")
    await a.set_routes([at(b)])
    await joined(a, "b")
    before = await a.routes()
    issued = MeshAuthority(CODE).issue("a", ["10.1.2.3"], now_s=int(time.time()))
    await a.renew_tls(issued)
    new = x509.load_pem_x509_certificate(issued.cert_pem)
    assert await asyncio.to_thread(shown_by, a) == new.serial_number
    assert [route.address for route in await a.routes()] == [route.address for route in before]
    assert lan.log("a").count("Route connection created") == 1
    await b.set_routes([at(a)])  # And b believes it when it dials.
    assert await prove_peer(lan.files("b", CODE), "127.0.0.1", a.route_port) == "a"


def shown_by(broker: EmbeddedBroker) -> int:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", broker.route_port)) as plain,
        context.wrap_socket(plain) as tls,
    ):
        der = tls.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).serial_number


async def test_only_its_own_certificate_can_be_renewed(lan: Lan) -> None:
    (a,) = await lan.started("a")
    issued = MeshAuthority(CODE).issue("b", [], now_s=int(time.time()))
    with pytest.raises(ConfigurationError, match="is of b, not of a"):
        await a.renew_tls(issued)
    for without in (EmbeddedBroker(), lan.broker("c", open=True)):
        with pytest.raises(ConfigurationError, match="no certificate"):
            await without.renew_tls(issued)


async def shut_out(lan: Lan, ours: EmbeddedBroker, theirs: EmbeddedBroker) -> None:
    """Nothing passes in either direction, whoever of the two dials."""
    async with (
        connected(ours.client_config()) as member,
        connected(theirs.client_config()) as stranger,
    ):
        inbox, stolen = Mailbox(), Mailbox()
        await member.listen(BOB, inbox)
        await stranger.listen(BOB, stolen)
        for dialler, acceptor in ((theirs, ours), (ours, theirs)):
            before = lan.log("ours").count(REFUSED)
            await dialler.set_routes([at(acceptor)])
            async with asyncio.timeout(DEADLINE_S):
                while lan.log("ours").count(REFUSED) == before:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await stranger.send(BOB, b"injected")
            await member.send(BOB, b"for members")
            await inbox.has(1)
            await stolen.has(1)
            assert (await ours.routes(), await theirs.routes()) == ((), ())
            await dialler.set_routes([])
        assert set(inbox.all) == {b"for members"}
        assert set(stolen.all) == {b"injected"}
    assert "Route connection created" not in lan.log("ours")


async def test_another_code_joins_neither_as_dialler_nor_as_acceptor(lan: Lan) -> None:
    (ours,) = await lan.started("ours")
    (theirs,) = await lan.started("theirs", code=OTHER)  # It even claims the same network.
    await shut_out(lan, ours, theirs)
    with pytest.raises(RemoteProtocolError, match="another join code"):
        await prove_peer(MeshFiles.of(lan.root / "ours" / "tls"), "127.0.0.1", theirs.route_port)


@pytest.mark.parametrize("days", [-LIFE_S // DAY_S - 1, 3])
async def test_out_of_its_time_a_certificate_joins_nobody(lan: Lan, days: int) -> None:
    (ours,) = await lan.started("ours")
    (theirs,) = await lan.started("theirs", issued_s=int(time.time()) + days * DAY_S)
    await shut_out(lan, ours, theirs)
    assert re.search(r"expired or is not yet valid", lan.log("ours") + lan.log("theirs"))


async def test_who_believes_us_without_being_believed_is_refused_by_us(lan: Lan) -> None:
    (ours,) = await lan.started("ours")
    believed, theirs = MeshFiles.of(lan.root / "ours" / "tls").ca, lan.files("theirs", OTHER)
    mixed = MeshFiles(believed, theirs.cert, theirs.key)
    with pytest.raises(RemoteProtocolError, match="does not let us in"):
        await prove_peer(mixed, "127.0.0.1", ours.route_port)


# Strangers


async def test_a_server_without_a_certificate_reads_and_injects_nothing(lan: Lan) -> None:
    a, b = await lan.started("a", "b")
    route = f"nats://{at(a)}"
    text = f'cluster {{ name: coase-{CODE.net}, listen: "127.0.0.1:-1", pool_size: -1'
    async with (
        bare_server(lan.root / "plain", f'{text}, routes: ["{route}"] }}') as plain,
        bare_server(lan.root / "bait", f"{text} }}") as bait,
        connected(a.client_config()) as sender,
        connected(b.client_config()) as receiver,
        connected(NatsConfig(urls=(plain.url,), net=CODE.net)) as spy,
        connected(NatsConfig(urls=(bait.url,), net=CODE.net)) as trap,
    ):
        inbox, stolen = Mailbox(), Mailbox()
        await receiver.listen(BOB, inbox)
        await spy.listen(BOB, stolen)
        await trap.listen(BOB, stolen)
        lure = bait.ports["cluster"][0].rpartition("//")[2]
        await a.set_routes([at(b), lure])  # As a forged advertisement would have it.
        # Each refuses the other: a its word in clear, and it a's TLS.
        await eventually(lambda: lan.log("a").count(REFUSED) >= 2)
        await eventually(lambda: "Router connection closed" in bait.log)
        for stranger in (spy, trap):
            await stranger.send(BOB, b"injected")
        await reaches(sender, inbox)
        await stolen.has(2)
        assert await peers(a) == {"b"}
        assert set(inbox.all) == {b"are you there"}
        assert stolen.all == [b"injected"] * 2  # Each its own.
    for server in ("plain", "bait"):
        assert '"a"' not in (lan.root / server / "log").read_text()


async def test_an_address_that_a_member_passes_on_is_proved_as_well(lan: Lan) -> None:
    """A careless member advertises somebody else's port as its own."""
    text = f'cluster {{ name: coase-{CODE.net}, listen: "127.0.0.1:-1", pool_size: -1 }}'
    async with bare_server(lan.root / "bait", text) as bait:
        a, b = await lan.started("a", "b")
        lure = bait.ports["cluster"][0].rpartition("//")[2]
        careless = lan.broker("careless", advertise=lure)
        await careless.start()
        await b.set_routes([at(a)])
        await joined(a, "b")
        await careless.set_routes([at(a)])  # And a tells b of the lure.
        await eventually(lambda: "Router connection closed" in bait.log)
        await eventually(lambda: REFUSED in lan.log("b"))
        await joined(a, "b", "careless")
        await joined(b, "a")


async def test_garbage_and_silence_at_the_route_port_learn_nothing_and_hinder_nobody(
    lan: Lan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_config, "TLS_WAIT_MAX_S", 1)
    a, b = await lan.started("a", "b")
    said = (b"", b"\x16\x03\x01\x02\x00\x01", b"CONNECT {}\r\nPING\r\nSUB > 1\r\n", b"\0" * 5000)
    strangers = [await asyncio.open_connection("127.0.0.1", a.route_port) for _ in range(80)]
    for number, (_, writer) in enumerate(strangers):
        writer.write(said[number % len(said)])
    await b.set_routes([at(a)])
    await joined(a, "b")
    for reader, writer in strangers:
        with contextlib.suppress(ConnectionResetError):  # Some of what was said was not read.
            assert await reader.read() == b""
        writer.transport.abort()
    assert await peers(a) == {"b"}


async def test_a_dialler_says_nothing_in_clear(lan: Lan) -> None:
    first: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"X","tls_required":false,"cluster":"x"}\r\n')
        if not first.done():
            first.set_result(await reader.read(4096))
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    (a,) = await lan.started("a")
    await a.set_routes([f"127.0.0.1:{server.sockets[0].getsockname()[1]}"])
    async with asyncio.timeout(DEADLINE_S):
        said = await first
    assert said[:2] == b"\x16\x03"  # The first record of TLS.
    assert b"coase" not in said
    await a.set_routes([])
    server.close()
    await server.wait_closed()


# The ports


async def test_only_the_route_port_is_open_beyond_loopback(lan: Lan) -> None:
    (a,) = await lan.started("a", listen=broker_config.ANY_ADDRESS)
    found = listening(a.pid)
    assert (a.port, True) in found
    assert (a.route_port, False) in found
    assert len(found) == 2
    with socket.create_connection(("127.0.0.1", a.route_port)):
        pass


def listening(pid: int) -> set[tuple[int, bool]]:
    """Each port that a process listens on, and whether that is on loopback."""
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    found = set()
    for family in ("tcp", "tcp6"):
        path = Path(f"/proc/{pid}/net/{family}")
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in links:
                address, _, port = fields[1].partition(":")
                found.add((int(port, 16), address == "0100007F"))
    return found


async def test_on_all_addresses_it_is_reached_by_ipv6_as_well(lan: Lan) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    a, b = await lan.started("a", "b", listen=broker_config.ANY_ADDRESS)
    assert await prove_peer(lan.files("x", CODE), "::1", a.route_port) == "a"
    await b.set_routes([f"[::1]:{a.route_port}"])
    await joined(b, "a")
    assert (await b.routes())[0].address == f"[::1]:{a.route_port}"


async def test_a_taken_route_port_is_an_error_that_names_it(lan: Lan) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"route port {port} on 127\.0\.0\.1"):
            await lan.broker("a", port=port).start()


async def test_without_a_mesh_there_are_no_routes() -> None:
    broker = EmbeddedBroker()
    assert (await broker.routes(), broker.route_port) == ((), 0)
    with pytest.raises(ConfigurationError, match="for one machine"):
        await broker.set_routes(["127.0.0.1:4248"])


async def test_an_open_mesh_takes_anybody_and_warns(
    lan: Lan, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    a, b = await lan.started("a", "b", open=True, net="local")
    assert caplog.text.count("is open") == 2
    assert "use a join code" in caplog.text
    await a.set_routes([at(b)])
    await joined(b, "a")
    assert "tls" not in lan.config("a")


# Secrets


async def test_the_user_who_asks_for_routes_may_do_nothing_else(lan: Lan) -> None:
    (a,) = await lan.started("a")
    found = re.search(r'user: "system", password: "([^"]*)"', lan.config("a"))
    assert found is not None
    reader, writer = await asyncio.open_connection("127.0.0.1", a.port)
    server = json.loads((await reader.readline()).removeprefix(b"INFO "))["server_id"]
    login = json.dumps({"user": "system", "pass": found[1], "verbose": False})
    writer.write(f"CONNECT {login}\r\nPING\r\n".encode())
    assert await reader.readline() == b"PONG\r\n"
    for tried in (
        "SUB > 1",
        "SUB $SYS.> 2",
        f"PUB $SYS.REQ.SERVER.{server}.RELOAD 0\r\n",
        f"PUB $SYS.REQ.SERVER.{server}.CONNZ 0\r\n",
        "PUB coase.v1.x 0\r\n",
    ):
        writer.write(f"{tried}\r\n".encode())
        assert b"Permissions Violation" in await reader.readline()
    writer.close()
    await writer.wait_closed()
    other = EmbeddedBroker(state_dir=lan.root / "a" / "broker", net=CODE.net, mesh=a._mesh)
    assert other._system_password != found[1]  # Of this run; kept nowhere else.


async def test_the_code_is_in_no_file(lan: Lan) -> None:
    await lan.started("a")
    secrets = [CODE.text, CODE.secret_bytes.hex(), CODE.ca_seed.hex(), CODE.secret_bytes.decode()]
    for path in lan.root.rglob("*"):
        if path.is_file():
            text = path.read_bytes().decode(errors="replace")
            assert not any(secret in text for secret in secrets), path
            if path.name != "broker.log" and "ports" not in path.parts:
                assert path.stat().st_mode & 0o777 == 0o600, path


# What it is told


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("10.0.0.7:4248", "10.0.0.7:4248"),
        ("[FD00:0:0::7]:1", "[fd00::7]:1"),
        ("[fe80::1%eth0]:65535", "[fe80::1%eth0]:65535"),
        ("Laptop.local:4248", "laptop.local:4248"),
    ],
)
def test_an_address_has_one_spelling(written: str, read: str) -> None:
    assert route_address(written) == read


@pytest.mark.parametrize(
    "address",
    [
        *("", "10.0.0.7", "10.0.0.7:", ":4248", "10.0.0.7:0", "10.0.0.7:65536", "10.0.0.7:04248"),
        *("fd00::7:4248", "[10.0.0.7]:1", "[name]:1", "a b:1", 'a"b:1', "user:pass@host:1"),
        *("nats://host:1", "host:1/x", "[fe80::1%a b]:1", "[fe80::1%]:1", "10.0.0.7%eth0:1"),
        *("-a:1", "a..b:1", "host:1\n", "$HOME:1", "10.0.0.7:-1", "٣:1", "host:٣"),
    ],
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigurationError, match="no address of a broker's route port"):
        route_address(address)


def test_a_mesh_has_a_limit() -> None:
    others = [f"10.0.0.{number}:4248" for number in range(1, NODES_MAX)]
    assert len(route_addresses([*others, *others])) == 31
    with pytest.raises(ConfigurationError, match="at most 32 nodes"):
        route_addresses([*others, "10.0.1.1:4248"])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "either for members"),
        ({"open": True, "tls": MeshFiles.of(Path("x"))}, "either for members"),
        ({"open": True, "node_id": "A b"}, "no name of a node"),
        ({"open": True, "port": 65536}, "no port"),
        ({"open": True, "port": -1}, "no port"),
        ({"open": True, "listen": "localhost"}, "no address to listen on"),
        ({"open": True, "advertise": "here"}, "no address of a broker"),
        ({"open": True, "routes": ("there",)}, "no address of a broker"),
    ],
)
def test_what_cannot_work_is_refused_at_once(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        MeshConfig(**({"node_id": "a"} | wrong))


def test_durations_are_read_as_the_server_writes_them() -> None:
    spelled = {"0s": 0, "399µs": 399, "5.890558ms": 5890, "999ns": 0, "1.5s": 1_500_000, "": 0}
    spelled["1m2.5s"] = 62_500_000
    assert {text: _microseconds(text) for text in spelled} == spelled
